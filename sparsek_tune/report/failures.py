"""Why attempts failed: grouped by how and by reason, whatever numbers stand in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sparsek_tune.report.evidence import Attempt, Gpu

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_LONGEST = 500  # characters of a reason that tell it from others


@dataclass
class Cause:
    """status, pattern: of all attempts in it, numbers left out; example: the latest; kernels: attempts by kernel."""

    status: str
    pattern: str
    example: Attempt
    kernels: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.kernels.values())


def causes(gpu: Gpu) -> list[Cause]:
    """Of all failed attempts on a GPU, the most frequent first."""
    found: dict[tuple[str, str], Cause] = {}
    for search in gpu.searches:
        for attempt in search.attempts:
            if attempt.failed:
                pattern = _NUMBER.sub("…", attempt.reason[:_LONGEST])
                cause = found.setdefault((attempt.status, pattern), Cause(attempt.status, pattern, attempt))
                cause.kernels[search.kernel.name] = cause.kernels.get(search.kernel.name, 0) + 1
                cause.example = max(cause.example, attempt, key=lambda a: a.at)
    return sorted(found.values(), key=lambda c: (-c.count, c.status, c.pattern))
