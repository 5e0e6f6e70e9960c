"""Helion's search algorithms, driven through its interface for external kernels."""

from __future__ import annotations

from importlib.util import find_spec

ALGORITHMS: dict[str, str] = {}


def missing_packages() -> list[str]:
    """What is needed and not installed."""
    return [] if find_spec("helion") else ["helion"]
