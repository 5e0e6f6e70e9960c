"""The kernel families. A new family is one new file and its name in ``FAMILIES``."""

from __future__ import annotations

import importlib
from typing import Any

from .base import Template

# In the order in which they run, and in which they are tuned.
FAMILIES = ("threshold", "schedule", "forward", "dq", "dkv")

TEMPLATES: dict[str, Template]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: the families import triton, the definitions in ``base`` do not.
    if name != "TEMPLATES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (importlib.import_module(f".{family}", __name__) for family in FAMILIES)
    templates = globals()["TEMPLATES"] = {m.TEMPLATE.name: m.TEMPLATE for m in modules}
    return templates
