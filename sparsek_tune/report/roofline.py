"""Where defaults and winners stand under the roof of their GPU: by the templates' cost models and measured times."""

from __future__ import annotations

from typing import NamedTuple

from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config, Cost
from sparsek_tune.peaks import peak
from sparsek_tune.report.evidence import Gpu, Search, default

# The stages that the tuner times together with one (tune.stages.Pipeline): their costs are part of what was timed.
_TIMED_WITH = {"schedule": ("forward", "dq", "dkv")}


class Point(NamedTuple):
    """flops: achieved (1/s); intensity: FLOPs a byte; share: of what the roof allows there, None without a roof."""

    ms: float
    flops: float
    intensity: float
    share: float | None


class Placed(NamedTuple):
    """A search's default and winner; None for one whose cost is not known."""

    search: Search
    default: Point | None
    winner: Point | None


def place(gpu: Gpu) -> list[Placed]:
    """Every search whose winner was timed and of which the cost model can say anything."""
    placed = []
    for search in gpu.searches:
        winner = search.winner
        if winner is None or not winner.default_ms or not winner.tuned_ms:
            continue
        found = Placed(search, _point(search, search.default, winner.default_ms),
                       _point(search, winner.config, winner.tuned_ms))  # fmt: skip
        if found.default or found.winner:
            placed.append(found)
    return placed


def _point(search: Search, config: Config | None, ms: float) -> Point | None:
    work = None if config is None else cost(search, config)
    if work is None or not work.flops > 0 or not work.bytes > 0:
        return None
    flops, intensity = work.flops / ms * 1e3, work.flops / work.bytes
    known = peak(search.device)
    share = None
    if known is not None:
        roof = known.of(search.problem.dtype)
        share = flops / min(roof.flops, intensity * roof.bandwidth)
    return Point(ms, flops, intensity, share)


def cost(search: Search, config: Config) -> Cost | None:
    """Of what was timed, by this installation's cost models. None for a config or problem that they do not take."""
    template = search.kernel.template
    if template is None or not template.contains(config):
        return None
    try:
        costs = [template.cost(config, search.problem)]
        for name in _TIMED_WITH.get(template.name, ()):
            other = TEMPLATES[name]
            companion = default(other, search.problem, search.device)
            if companion is None:
                return None
            costs.append(other.cost(companion, search.problem))
    except Exception:  # a record's problem may be anything, and a cost model expects one that can be run
        return None
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs), sum(c.launches for c in costs))
