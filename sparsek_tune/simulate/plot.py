"""The plot of a document: best found against measurements and against seconds. Needs matplotlib."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsek_tune.simulate.results import LEVEL

_AXES = (("by_measurements", "measurements"), ("by_seconds", "seconds (model of the clock)"))
_POINTS = 200
_COLOURS = 10  # of matplotlib's cycle


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw ``document`` into ``path`` (.png, .svg or .pdf): a row for all kernels and one for each.

    Raises OSError where it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, whatever the environment says
    from matplotlib.figure import Figure

    results = document["results"]
    names = list(dict.fromkeys(r["strategy"] for r in results))
    kernels = list(dict.fromkeys(r["kernel"] for r in results))
    groups = {"all": results, **{k: [r for r in results if r["kernel"] == k] for k in kernels}}
    figure = Figure(figsize=(13, 3.2 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for row, (title, group) in zip(axes, groups.items(), strict=True):
        for ax, (key, label) in zip(row, _AXES, strict=True):
            for number, name in enumerate(names):
                mine = [r[key] for r in group if r["strategy"] == name]
                if mine:
                    _line(ax, name, number, band(mine))
            ax.axhline(LEVEL, color="black", linewidth=0.6, linestyle=":")
            ax.set(xscale="log", xlabel=label, ylabel="best found / optimum", title=title, ylim=_limits(ax))
            ax.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8, loc="lower right", ncols=2)
    figure.savefig(path, dpi=110)


def band(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float, float, float]]:
    """Points (x, lower quartile, median, upper): the mean over landscapes of such curves, from where all have begun;
    each keeps its last value."""
    first, last = max(c[0][0] for c in curves), max(c[-1][0] for c in curves)
    xs = [first * (last / first) ** (i / (_POINTS - 1)) for i in range(_POINTS)]
    points = []
    for x in xs:
        at = [c[max(0, bisect.bisect_right(c, x * (1 + 1e-9), key=lambda p: p[0]) - 1)] for c in curves]
        low, median, high = (sum(p[i] for p in at) / len(at) for i in (1, 2, 3))
        points.append((x, low, median, high))
    return points


def _line(ax: Any, name: str, number: int, points: Sequence[tuple[float, float, float, float]]) -> None:
    xs, low, median, high = zip(*points, strict=True)
    colour, style = f"C{number}", "-" if number < _COLOURS else "--"
    ax.step(xs, median, where="post", color=colour, linestyle=style, label=name, linewidth=1.5)
    ax.fill_between(xs, low, high, step="post", color=colour, alpha=0.12, linewidth=0)


def _limits(ax: Any) -> tuple[float, float]:
    lowest = min((min(line.get_ydata()) for line in ax.lines), default=0.0)
    return max(0.0, lowest - 0.01), 1.002
