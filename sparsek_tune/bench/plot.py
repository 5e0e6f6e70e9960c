"""The plot of a document: time against length beside the peers, and what the stages take. Needs matplotlib, no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsek_tune.bench.cases import STAGES, Case, case_of
from sparsek_tune.bench.report import get

SUFFIXES = (".png", ".svg", ".pdf")
PANELS = (("forward", "forward"), ("forward_backward", "forward + backward"))
Entry = Mapping[str, Any]
Lines = dict[str, list[tuple[int, float]]]


def available(extra: str = "bench") -> str | None:
    """Why nothing can be drawn, or None. extra: that of this package which brings what is needed."""
    try:
        import matplotlib
    except ImportError:
        return f"matplotlib is not installed: pip install 'sparsek-tune[{extra}]'"
    del matplotlib
    return None


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw ``document`` into ``path`` (.png, .svg or .pdf). Raises OSError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, whatever the environment says
    from matplotlib.figure import Figure

    cases = sorted((c for c in document["cases"] if c.get("totals")), key=_place)
    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for ax, (name, title) in zip(axes[:2], PANELS, strict=True):
        _times(ax, title, our_lines(cases, name), peer_lines(cases, name))
    _stages(axes[2], cases)
    versions = document["versions"]
    figure.suptitle(
        f"{document['device']['name']}, torch {versions['torch']}, Triton {versions['triton']}", fontsize=10
    )
    figure.savefig(path, dpi=150)


def our_lines(cases: Sequence[Entry], name: str) -> Lines:
    """Label -> points (length, ms), sorted, of our total ``name``: one line for all that differs but length and k."""
    found = [case_of(c) for c in cases]
    lines: Lines = {}
    for case, entry in zip(found, cases, strict=True):
        time = get(entry, "totals", name, "median")
        if time is not None:
            lines.setdefault(_label("SparseK", case, found), []).append((case.shape.n, time))
    return {label: sorted(points) for label, points in lines.items()}


def peer_lines(cases: Sequence[Entry], name: str) -> Lines:
    """The same for the peers; of the first distribution and window only, which is where the picture stays readable."""
    first = [c for c in cases if _side(c) == _side(cases[0])]
    found = [case_of(c) for c in first]
    lines: Lines = {}
    for case, entry in zip(found, first, strict=True):
        for peer, row in entry["peers"].items():
            time = get(row, name, "median")
            if time is not None:
                lines.setdefault(_label(peer, case, found), []).append((case.shape.n, time))
    return {label: sorted(points) for label, points in lines.items()}


def _place(entry: Entry) -> tuple[int, int]:
    """Short rows first, and those without a window: of what has it the peers are drawn."""
    return entry["problem"]["w"], entry["problem"]["n"]


def _side(entry: Entry) -> tuple[str, int]:
    return entry["distribution"], entry["problem"]["w"]


def _label(name: str, case: Case, among: Sequence[Case]) -> str:
    """name, and what tells the line of ``case`` from those of the others: never two points at one length."""
    fields = [{**asdict(c.shape), "": c.distribution} for c in among]
    mine = {**asdict(case.shape), "": case.distribution}
    varying = [f for f in mine if f not in ("n", "k") and len({x[f] for x in fields}) > 1]
    points = [tuple(x[f] for f in ("n", *varying)) for x in fields]
    if len(set(points)) < len(points):
        varying.append("k")
    return " ".join((name, *(f"{f}={mine[f]}" if f else str(mine[f]) for f in varying)))


def _times(ax: Any, title: str, ours: Lines, peers: Lines) -> None:
    for lines, style in ((ours, "o-"), (peers, "s--")):
        for label, points in lines.items():
            ax.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=2 if lines is ours else 1)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("length N")
    ax.set_ylabel("ms")
    ax.set_title(title)
    ax.grid(True, which="both", alpha=0.2)
    if ours or peers:
        ax.legend(fontsize=7)


def _stages(ax: Any, cases: Sequence[Entry]) -> None:
    """Stacked bars: nanoseconds of every stage for a token."""
    labels = [str(case_of(c)) for c in cases]
    base = [0.0] * len(cases)
    for name in STAGES:
        per_token = [(get(c, "stages", name, "median") or 0.0) * 1e6 / _tokens(c) for c in cases]
        ax.barh(labels, per_token, left=base, label=name)
        base = [a + b for a, b in zip(base, per_token, strict=True)]
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xlabel("ns per token")
    ax.set_title("stages")
    if cases:
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(STAGES))


def _tokens(entry: Entry) -> int:
    return entry["problem"]["b"] * entry["problem"]["n"]
