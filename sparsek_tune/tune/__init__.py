"""The tuner: propose, compile, verify, measure, record, choose; one module a step.

This package imports nothing heavy, so that its worker processes start fast; :func:`tune` loads the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.types import EFFORTS, Effort, Event, OnEvent, Row

if TYPE_CHECKING:
    from sparsek_tune.db.store import Store

__all__ = ["EFFORTS", "Effort", "Event", "Row", "tune"]


def tune(
    problems: Iterable[Problem],
    device: Device | None,
    store: Store,
    *,
    effort: str = "default",
    budget: float | None = None,
    on_event: OnEvent | None = None,
    target: str | None = None,
    kernels: Collection[str] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Tune every template for ``problems`` on ``device`` and put measurements and winners into ``store``.

    effort: a name of ``EFFORTS``; budget: wall time of the whole run in seconds; target ("cuda:90"): tune without a GPU
    for that target instead of ``device`` (results are marked static); kernels: names of the templates to tune (None:
    all), the others as stored or by default; on_event is called with each :class:`Event`. Goes on from what the store
    already holds. Raises ValueError for an unknown effort, target or kernel or a budget <= 0. DatabaseError,
    ``channel.MachineError`` (a full disk, a GPU that is gone: no candidate could go well) and KeyboardInterrupt pass
    through after the workers are gone, and everything measured until then is kept.
    """
    from sparsek_tune.tune.tuner import tune as run

    return run(
        problems, device, store, effort=effort, budget=budget, on_event=on_event, target=target, kernels=kernels,
        seed=seed,
    )  # fmt: skip
