"""Drawings as SVG text, to stand within a page: its style sheet colours them. Nothing but numbers and words of this
file gets into them; what the database calls things stands beside them, in HTML."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

from sparsek_tune.peaks import Peak
from sparsek_tune.report.evidence import Attempt, Search
from sparsek_tune.report.roofline import Placed

COLOURS = 8  # series that are told apart: --s0 to --s7 of the style sheet

# matplotlib gets colours that mean nothing, and what is drawn gets the style sheet's in their place.
_INK, _MUTED, _RULE, _PAPER = "#0000e0", "#0000e1", "#0000e2", "#0000e3"
_SERIES = tuple(f"#0000f{i}" for i in range(COLOURS))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _PAPER: "paper"} | {
    c: f"s{i}" for i, c in enumerate(_SERIES)
}
_STYLE = {
    "svg.fonttype": "none", "font.family": ["sans-serif"], "font.sans-serif": ["DejaVu Sans"], "font.size": 8,
    "text.color": _INK, "axes.labelcolor": _MUTED, "axes.edgecolor": _RULE, "xtick.color": _MUTED,
    "ytick.color": _MUTED, "grid.color": _RULE, "grid.linewidth": 0.6, "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
    "ytick.minor.size": 0, "axes.axisbelow": True,
}  # fmt: skip


@contextmanager
def _figure(
    name: str, size: tuple[float, float], box: tuple[float, float, float, float]
) -> Iterator[tuple[Any, list[Markup]]]:
    """Axes to draw on, and a list that holds the SVG at the end. name: unlike any other of the page, as the ids depend
    on it; size: in inches; box: of the axes, (left, bottom, width, height) as parts of the figure's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    done: list[Markup] = []
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):  # type: ignore[arg-type]
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        axes = figure.add_axes(box)
        yield axes, done
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    done.append(_inline(out.getvalue()))


def _inline(svg: str) -> Markup:
    """An SVG file's text as a part of a page: no prologue, no style for all of the page, no size of its own, no ids but
    those that are referred to, the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"font-family: [^;]*;?|font: [\d.]+px '[^;]*;?", "", svg)
    svg = re.sub("|".join(_VARIABLES), lambda m: f"var(--{_VARIABLES[m[0]]})", svg)
    return Markup(re.sub(r"\s*\n\s*", " ", svg.strip()).replace("> <", "><"))


def curve(search: Search, name: str) -> Markup:
    """Best time so far against configs tried; right of it, what the default (open) and the fastest got in a race."""
    with _figure(name, (3.5, 2.0), (0.155, 0.2, 0.825, 0.74)) as (ax, done):
        tried, steps = len(search.trials), search.curve
        xs, ys = [s.tried for s in steps] + [tried], [s.ms for s in steps] + [steps[-1].ms]
        ax.step(xs, ys, where="post", color=_SERIES[0], linewidth=1.8)
        ax.plot(xs[:-1], ys[:-1], "o", color=_SERIES[0], markersize=2.5)
        contenders = _ends(search)
        if contenders:
            ax.axvline(tried * 1.04 + 0.5, color=_RULE, linewidth=0.8)
            ax.text(tried * 1.11 + 1, 1.0, "race", color=_MUTED, ha="center", transform=ax.get_xaxis_transform())
        for i, attempt in enumerate(contenders):
            _interval(ax, tried * (1.08 + 0.06 * i) + 1, attempt, filled=i > 0)
        ax.set_xlim(0, tried * (1.18 if contenders else 1.02) + 1.5)
        ax.xaxis.set_major_locator(_whole_numbers(tried))
        ax.margins(y=0.12)
        ax.grid(axis="y")
        ax.set_xlabel("configs tried")
        ax.set_ylabel("ms")
    return done[0]


def _ends(search: Search) -> list[Attempt]:
    """Of a race: the default, where it is known, and the fastest."""
    if not search.race:
        return []
    fastest = min(search.race.values(), key=lambda a: a.ms or 0.0)
    default = search.race.get(search.default) if search.default is not None else None
    return [fastest] if default is None or default is fastest else [default, fastest]


def _interval(ax: Any, x: float, attempt: Attempt, filled: bool) -> None:
    if attempt.low and attempt.high:
        ax.plot([x, x], [attempt.low, attempt.high], color=_SERIES[1], linewidth=1)
    face = _SERIES[1] if filled else _PAPER
    ax.plot(x, attempt.ms, "o", color=_SERIES[1], markerfacecolor=face, markersize=4.5, markeredgewidth=1.2)


def _whole_numbers(most: int) -> Any:
    """Ticks up to ``most``: what stands beyond is no number of configs."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    ticks = MaxNLocator(5, integer=True).tick_values(0, most)
    return FixedLocator([t for t in ticks if 0 <= t <= most])


def roofline(placed: Sequence[Placed], kernels: Sequence[str], roofs: Sequence[Peak], name: str) -> Markup:
    """Achieved FLOP/s against intensity: defaults open, winners filled, a colour for each of ``kernels``."""
    with _figure(name, (7.2, 4.0), (0.085, 0.12, 0.9, 0.85)) as (ax, done):
        ax.set_xscale("log")
        ax.set_yscale("log")
        points = []
        for p in placed:
            colour = _SERIES[kernels.index(p.search.kernel.name) % COLOURS]
            ends = [x for x in (p.default, p.winner) if x is not None]
            ax.plot([x.intensity for x in ends], [x.flops for x in ends], color=colour, linewidth=1, alpha=0.7)
            for point, face in ((p.default, _PAPER), (p.winner, colour)):
                if point is not None:
                    ax.plot(point.intensity, point.flops, "o", color=colour, markerfacecolor=face, markersize=6)
                    points.append(point)
        low, high = min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 3
        bottom, top = min(p.flops for p in points) / 2, max(p.flops for p in points) * 2
        for roof in roofs:
            ridge = roof.flops / roof.bandwidth
            low, high, top = min(low, ridge / 4), max(high, ridge * 4), max(top, roof.flops * 2)
            xs = [low, ridge, high]
            ax.plot(xs, [low * roof.bandwidth, roof.flops, roof.flops], color=_INK, linewidth=1.4, zorder=1)
            ax.text(high, roof.flops * 1.06, f"{roof.flops / 1e12:.4g} TFLOP/s ", ha="right", va="bottom")
        ax.set_xlim(low, high)
        ax.set_ylim(bottom, top)
        for bandwidth in {roof.bandwidth for roof in roofs}:
            _along(ax, bandwidth, max(low, bottom / bandwidth), high)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.yaxis.set_major_formatter(lambda y, _: f"{y / 1e12:g}")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_formatter(lambda *_: "")
        ax.grid(True)
        ax.set_xlabel("FLOPs a byte")
        ax.set_ylabel("TFLOP/s")
    return done[0]


def _along(ax: Any, bandwidth: float, low: float, high: float) -> None:
    """Write a bandwidth (B/s) along its line, a fifth of the way up."""
    (x0, y0), (x1, y1) = ax.transData.transform([(low, low * bandwidth), (high, high * bandwidth)])
    at = low ** (4 / 5) * high ** (1 / 5)
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    text = f"{bandwidth / 1e12:.4g} TB/s"
    ax.text(at, at * bandwidth * 1.15, text, ha="center", rotation=angle, rotation_mode="anchor")
