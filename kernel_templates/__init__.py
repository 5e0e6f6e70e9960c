"""The kernel families. A new family is one new file and its line here."""

from . import dkv, dq, forward, schedule, threshold
from .base import Template

# In the order in which they run, and in which they are tuned.
TEMPLATES: dict[str, Template] = {m.TEMPLATE.name: m.TEMPLATE for m in (threshold, schedule, forward, dq, dkv)}
