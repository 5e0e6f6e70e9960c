"""What is looked at in vain, and what is not looked at: the template's check, the compiler and the cost model, against
the sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sparsek_tune.simulate.landscape import Landscape, Outcome
from sparsek_tune.simulate.strategies import by_cost
from sparsek_tune.tune.cubin import MOST_STACK


def pruning(landscape: Landscape) -> dict[str, Any]:
    """Counts for one landscape, and how good what was pruned would have been.

    points, space: of the whole space, and of what the template's check leaves of it; known: configs of the sweep.
    dropped: what the check refuses. infeasible: what the compiler shows to spill or not to fit, compiled in vain.
    failed: what did not compile, crashed, hung or was wrong.
    dropped_best, spilled_best: of the configs that the check refuses, or that spill more than is accepted, and that the
    sweep timed all the same: the quality of the best (at 1 pruning would have cost the winner). None: none was timed,
    so nothing is known. timed, wrong: how many of both were timed, and how many of them would have won.
    near_best: of those that spill from half of what is accepted to all of it.
    cheaper: how many configs the cost model takes for cheaper than the winner.
    """
    known = landscape.outcomes.values()
    spilled = [o for o in known if o.stack > MOST_STACK]
    times = [o.true_ms for o in (*landscape.dropped.values(), *spilled) if o.true_ms is not None]
    least = min((o.true_ms for o in known if o.stack <= MOST_STACK and o.true_ms is not None), default=math.inf)
    failed = sum(o.status not in ("ok", "infeasible") for o in known)
    return {
        "kernel": landscape.kernel.name, "problem": landscape.problem._asdict(), "device": landscape.device.name,
        "points": landscape.kernel.size, "space": landscape.space, "known": len(known),
        "dropped": landscape.kernel.size - landscape.space,
        "infeasible": sum(o.status == "infeasible" for o in known), "failed": failed,
        "dropped_best": _best(landscape, landscape.dropped.values()),
        "spilled_best": _best(landscape, spilled), "timed": len(times), "wrong": sum(ms < least for ms in times),
        "near_best": _best(landscape, (o for o in known if MOST_STACK / 2 < o.stack <= MOST_STACK)),
        "cheaper": by_cost(landscape).index(landscape.winner),
    }  # fmt: skip


def _best(landscape: Landscape, outcomes: Iterable[Outcome]) -> float | None:
    times = [o.true_ms for o in outcomes if o.true_ms is not None]
    winner = landscape.outcomes[landscape.winner].true_ms
    return winner / min(times) if times and winner is not None else None
