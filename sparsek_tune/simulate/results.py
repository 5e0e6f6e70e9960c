"""What replays come to: medians and quartiles over seeds, as parts of a JSON document."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.simulate.landscape import Landscape
from sparsek_tune.simulate.replay import Step

LEVEL = 0.97  # of the optimum, that a search should reach
SHARES = (0.05, 0.1)  # of the space
COUNTS = (20, 40, 80)  # measurements
FINALISTS = 5  # that meet the default in the race which ends a search
_POINTS = 48  # of a curve

Quartiles = list[float | None]  # lower, median, upper; None is never


def quartiles(values: Iterable[float]) -> Quartiles:
    """Each a value that occurs (so that what is never reached, infinity, counts as that); infinity becomes None."""
    ordered = sorted(values)
    places = (math.ceil(share * len(ordered)) - 1 for share in (0.25, 0.5, 0.75))
    return [x if math.isfinite(x := ordered[max(0, place)]) else None for place in places]


def reached(steps: Sequence[Step], level: float = LEVEL) -> int | None:
    """The number (from 0) of the measurement that first found a config of that quality."""
    return next((i for i, step in enumerate(steps) if step.quality >= level), None)


def after(steps: Sequence[Step], count: int) -> float:
    """The best quality after ``count`` measurements; the last where there are fewer."""
    return steps[min(count, len(steps)) - 1].quality if steps and count else 0.0


def at(steps: Sequence[Step], seconds: float) -> float:
    """The best quality after so many seconds."""
    return after(steps, bisect.bisect_right(steps, seconds, key=lambda step: step.seconds))


def chosen(steps: Sequence[Step], landscape: Landscape) -> float:
    """The quality of what a race of the fastest, as they were measured, and the default would choose."""
    timed: dict[Config, float] = {s.config: s.ms for s in steps if s.ms is not None}
    finalists = sorted(timed, key=lambda c: timed[c])[:FINALISTS]
    if landscape.default in timed:
        finalists.append(landscape.default)
    return max(map(landscape.quality, finalists), default=0.0)


def result(strategy: str, landscape: Landscape, runs: Sequence[Sequence[Step]], settings: Mapping[str, Any]) -> Any:
    """The entry of one strategy at one landscape, of a run for each seed."""
    space, longest = landscape.space, max(map(len, runs), default=0)
    last = max((steps[-1].seconds for steps in runs if steps), default=0.0)
    places = [reached(steps) for steps in runs]
    found = [(steps, place) for steps, place in zip(runs, places, strict=True)]

    def over(value: Callable[[Sequence[Step]], float]) -> Quartiles:
        return quartiles(value(steps) for steps in runs)

    return {
        "strategy": strategy, "kernel": landscape.kernel.name, "problem": landscape.problem._asdict(),
        "device": landscape.device.name, "space": space, "seeds": len(runs), **settings, "measured": longest,
        "measurements_to_level": quartiles(math.inf if p is None else p + 1 for p in places),
        "seconds_to_level": quartiles(math.inf if p is None else steps[p].seconds for steps, p in found),
        "quality_at_share": {str(s): over(lambda r, s=s: after(r, round(s * space))) for s in SHARES},
        "quality_at_count": {str(n): over(lambda r, n=n: after(r, n)) for n in COUNTS},
        "chosen": quartiles(chosen(steps, landscape) for steps in runs),
        "thinking_seconds": over(lambda r: r[-1].thinking if r else 0.0),
        "by_measurements": [[n, *over(lambda r, n=n: after(r, n))] for n in map(round, _grid(1, longest, digits=0))],
        "by_seconds": [[s, *over(lambda r, s=s: at(r, s))] for s in _grid(1.0, last)],
    }  # fmt: skip


def _grid(first: float, last: float, digits: int = 3) -> list[float]:
    """From first to last, evenly by ratio, so far as different by so many digits after the point."""
    if last <= first:
        return [first]
    points = (first * (last / first) ** (i / (_POINTS - 1)) for i in range(_POINTS))
    return sorted({round(p, digits) for p in points})


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each strategy over all its landscapes: medians and means of the medians over seeds, the worst of them."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(r["strategy"] for r in results):
        mine = [r for r in results if r["strategy"] == name]
        shares = {s: [r["quality_at_share"][str(s)][1] for r in mine] for s in SHARES}
        counts = {n: [r["quality_at_count"][str(n)][1] for r in mine] for n in COUNTS}
        part = [_share(r) for r in mine]
        found[name] = {
            "landscapes": len(mine), "seeds": max(r["seeds"] for r in mine), "reached": sum(map(math.isfinite, part)),
            "share_to_level": quartiles(part)[1],
            "seconds_to_level": quartiles(math.inf if (s := r["seconds_to_level"][1]) is None else s for r in mine)[1],
            "quality_at_share": {str(s): _spread(values) for s, values in shares.items()},
            "quality_at_count": {str(n): _spread(values) for n, values in counts.items()},
            "chosen": _spread([r["chosen"][1] for r in mine]),
            "thinking_seconds_each": sum(r["thinking_seconds"][1] / max(1, r["measured"]) for r in mine) / len(mine),
        }  # fmt: skip
    return found


def _share(entry: Mapping[str, Any]) -> float:
    count = entry["measurements_to_level"][1]
    return math.inf if count is None else count / entry["space"]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"median": quartiles(values)[1], "mean": sum(values) / len(values), "worst": min(values)}
