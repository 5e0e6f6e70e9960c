"""The page: what the other modules found, through a template that escapes everything."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sparsek_tune import __version__, peaks
from sparsek_tune.db.schema import STATUSES
from sparsek_tune.report import figures, importance, roofline
from sparsek_tune.report.evidence import Gpu, Kernel, Search
from sparsek_tune.report.failures import Cause, causes

SECTIONS = (
    ("winners", "winners"), ("search", "search curves"), ("parameters", "parameter importances"),
    ("roofline", "roofline"), ("failures", "failures"),
)  # fmt: skip
CURVES = 6  # problems of one kernel that are drawn, those with most configs
ROWS = 400  # of a table
CAUSES = 30
_HERE = Path(__file__).parent


@dataclass
class View:
    """What the template shows of one GPU, the ``number``-th."""

    gpu: Gpu
    number: int

    @property
    def name(self) -> str:
        return short(self.gpu.device.name, 100)

    @property
    def static(self) -> bool:
        return self.gpu.device.static

    @property
    def facts(self) -> list[tuple[str, Any]]:
        d = self.gpu.device
        found = [
            ("compute capability", f"{d.cc / 10:.1f}"), ("SMs", d.sm_count), ("memory", f"{d.memory / 2**30:.0f} GiB"),
            ("driver", d.driver), ("CUDA", d.cuda), ("Triton", d.triton), ("torch", d.torch),
        ]  # fmt: skip
        return [(name, value) for name, value in found if value and value != "0 GiB"]

    @cached_property
    def tiles(self) -> list[tuple[Any, str]]:
        won = [s.winner for s in self.gpu.searches if s.winner is not None]
        speedups = [w.speedup for w in won if w.speedup is not None]
        attempts = list(self.gpu.attempts)
        found: list[tuple[Any, str]] = [
            (len(attempts), "measurements"),
            (len(self.gpu.searches), "searches (kernel and problem)"),
            (len(won), "winners"),
            (sum(a.failed for a in attempts), "failed attempts"),
        ]
        if speedups:
            found.append((f"{statistics.geometric_mean(speedups):.2f}×", "speed over default, geometric mean"))
        return found

    @property
    def searches(self) -> list[Search]:
        return self.gpu.searches[:ROWS]

    @property
    def more_searches(self) -> int:
        return max(0, len(self.gpu.searches) - ROWS)

    @cached_property
    def curves(self) -> list[tuple[Search, Markup]]:
        found = []
        for searches in self.gpu.by_kernel.values():
            most = sorted((s for s in searches if s.curve), key=lambda s: -len(s.trials))[:CURVES]
            found += [(s, figures.curve(s, f"{self.number} {s.kernel} {s.problem}")) for s in searches if s in most]
        return found

    @property
    def more_curves(self) -> int:
        return sum(bool(s.curve) for s in self.gpu.searches) - len(self.curves)

    @cached_property
    def importances(self) -> list[tuple[Kernel, importance.Importance]]:
        return [
            (kernel, importance.importance(searches))
            for kernel, searches in self.gpu.by_kernel.items()
            if any(s.times for s in searches)
        ]

    @property
    def peak(self) -> peaks.Peak | None:
        return peaks.peak(self.gpu.device)

    @cached_property
    def _placed(self) -> list[roofline.Placed]:
        return roofline.place(self.gpu)

    @property
    def placed(self) -> list[roofline.Placed]:
        return self._placed[:ROWS]

    @property
    def more_placed(self) -> int:
        return max(0, len(self._placed) - ROWS)

    @property
    def legend(self) -> list[str]:
        return list(dict.fromkeys(p.search.kernel.name for p in self.placed))

    @property
    def roofline(self) -> Markup:
        dtypes = dict.fromkeys(p.search.problem.dtype for p in self.placed)
        roofs = {self.peak.of(dtype) for dtype in dtypes} if self.peak is not None else set()
        return figures.roofline(self.placed, self.legend, sorted(roofs), f"roofline {self.number}")

    @cached_property
    def ends(self) -> dict[str, Counter[str]]:
        """Attempts by kernel and status."""
        found: dict[str, Counter[str]] = {}
        for search in self.gpu.searches:
            found.setdefault(search.kernel.name, Counter()).update(a.status for a in search.attempts)
        return found

    @property
    def statuses(self) -> list[str]:
        """Those that there are."""
        return [status for status in STATUSES if any(counts[status] for counts in self.ends.values())]

    @cached_property
    def _causes(self) -> list[Cause]:
        return causes(self.gpu)

    @property
    def causes(self) -> list[Cause]:
        return self._causes[:CAUSES]

    @property
    def more_causes(self) -> int:
        return max(0, len(self._causes) - CAUSES)


def render(gpus: Sequence[Gpu], source: str) -> str:
    """The page about ``gpus`` (at least one), as ASCII. source: where the records come from."""
    moments = [a.at for gpu in gpus for a in gpu.attempts]
    page = _environment().get_template("page.html").render(
        gpus=[View(gpu, number) for number, gpu in enumerate(gpus, 1)],
        source=source, total=len(moments), first=min(moments)[:16].replace("T", " "),
        last=max(moments)[:16].replace("T", " "), version=__version__, sections=SECTIONS,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")), known_peaks=peaks.KNOWN,
        enough=importance.ENOUGH, enough_each=importance.ENOUGH_EACH, most=importance.MOST, curves=CURVES,
        shuffles=importance.SHUFFLES,
    )  # fmt: skip
    return page.encode("ascii", "xmlcharrefreplace").decode()


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, finalize=_printable,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"short": short, "sig": significant, "config": words}
    return made


def _printable(x: Any) -> Any:
    """What may stand in a page: nothing that turns the direction of text around or means something to a terminal."""
    if isinstance(x, Markup) or not isinstance(x, str):
        return x
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in x)


def short(x: Any, most: int) -> str:
    """The text of ``x``, cut where it is longer than ``most`` characters."""
    text = str(x)
    return text if len(text) <= most else text[: most - 1] + "…"


def words(config: Mapping[str, Any]) -> str:
    """BM=64 BN=32: a config to be read."""
    return short(" ".join(f"{name}={value}" for name, value in sorted(config.items())), 300)


def significant(x: float | None, digits: int = 4) -> str:
    """A number to be read, - for none."""
    if x is None:
        return "-"
    return f"{x:#.{digits}g}".rstrip(".")
