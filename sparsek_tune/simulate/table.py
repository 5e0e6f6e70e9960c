"""A document of replays as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsek_tune.display import table
from sparsek_tune.problem import Problem
from sparsek_tune.simulate.results import COUNTS, LEVEL, SHARES, Quartiles

_LEVEL = f"{LEVEL:.0%}"


def show(document: Mapping[str, Any]) -> None:
    """Print the strategies over all landscapes, at each landscape, and the pruning."""
    _summary(document["summary"])
    _results(document["results"])
    _pruning(document["landscapes"])


def _summary(summary: Mapping[str, Mapping[str, Any]]) -> None:
    marks = [f"{n}" for n in COUNTS] + [f"{s:.0%}" for s in SHARES]
    header = (
        "strategy", "seeds", *(f"at {mark}" for mark in marks), f"reach {_LEVEL}", "of the space", "seconds",
        "thinking each",
    )  # fmt: skip
    rows = []
    for name, s in summary.items():
        found = [s["quality_at_count"][str(n)] for n in COUNTS] + [s["quality_at_share"][str(x)] for x in SHARES]
        rows.append((
            name, s["seeds"], *(f"{f['median']:.3f} {f['mean']:.3f} {f['worst']:.3f}" for f in found),
            f"{s['reached']}/{s['landscapes']}", _percent(s["share_to_level"]), _number(s["seconds_to_level"], 1),
            _number(s["thinking_seconds_each"], 3),
        ))  # fmt: skip
    table("Over kernels and problems: best found over the optimum (median, mean, worst)", header, rows)


def _results(results: Sequence[Mapping[str, Any]]) -> None:
    header = (
        "kernel", "problem", "strategy", *(f"at {n}" for n in COUNTS), *(f"at {s:.0%}" for s in SHARES), "chosen",
        f"to {_LEVEL}", "of", "seconds", "thinking",
    )  # fmt: skip
    order = sorted(results, key=lambda r: (r["kernel"], list(r["problem"].values())))
    table("Each: median (quartiles) over seeds", header, [
        (r["kernel"], _problem(r), r["strategy"], *(_spread(r["quality_at_count"][str(n)]) for n in COUNTS),
         *(_spread(r["quality_at_share"][str(s)]) for s in SHARES), _spread(r["chosen"]),
         _spread(r["measurements_to_level"], 0), str(r["space"]), _spread(r["seconds_to_level"], 1),
         _number(r["thinking_seconds"][1], 2))
        for r in order
    ])  # fmt: skip


def _pruning(landscapes: Sequence[Mapping[str, Any]]) -> None:
    header = (
        "kernel", "problem", "points", "dropped", "infeasible", "failed", "pruned and timed", "of these wrong",
        "best dropped", "best spilling too much", "best spilling much", "cheaper than the winner",
    )  # fmt: skip
    table("Pruning: by the check, by the compiler; best of it over the optimum", header, [
        (p["kernel"], _problem(p), str(p["points"]), _percent(p["dropped"] / p["points"]),
         _percent(p["infeasible"] / p["known"]), _percent(p["failed"] / p["known"]), str(p.get("timed", 0)),
         f"{p['wrong'] / p['timed']:.1%}" if p.get("timed") else "unknown", _quality(p["dropped_best"]),
         _quality(p["spilled_best"]), _quality(p["near_best"]), _percent(p["cheaper"] / p["known"]))
        for p in landscapes
    ])  # fmt: skip


def _problem(entry: Mapping[str, Any]) -> str:
    return str(Problem(**entry["problem"]))


def _spread(quartiles: Quartiles, digits: int = 3) -> str:
    low, median, high = (_number(x, digits) for x in quartiles)
    return f"{median} ({low}-{high})"


def _number(x: float | None, digits: int) -> str:
    return "never" if x is None else f"{x:.{digits}f}"


def _percent(x: float | None) -> str:
    return "never" if x is None else f"{x:.1%}"


def _quality(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.3f}"
