"""The tuner: propose, compile, verify, measure, record, choose; one module a step.

This package imports nothing heavy, so that its worker processes start fast; :func:`tune` loads the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.types import EFFORTS, Effort, Event, OnEvent, Row

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sparsek_tune.db.store import Store
    from sparsek_tune.tune.suite import Suite

    Crew = Callable[[Suite, OnEvent], AbstractContextManager[object]]

__all__ = ["EFFORTS", "Effort", "Event", "Row", "join", "tune"]


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
    jobs: int | None = None,
    crew: Crew | None = None,
) -> list[Row]:
    """Tune every template for ``problems`` on ``device`` and put measurements and winners into ``store``.

    effort: a name of ``EFFORTS``; budget: wall time of the whole run in seconds; target ("cuda:90"): tune without a GPU
    for that target instead of ``device`` (results are marked static); kernels: names of the templates to tune (None:
    all), the others as stored or by default; jobs: processes that compile (None: by CPUs and memory); crew: the context
    in which other processes work at this run too, made from its suite and what takes their events; on_event is called
    with each :class:`Event`. Goes on from what the store already holds. Raises ValueError for an unknown effort, target
    or kernel or a budget that is not above 0 and finite. DatabaseError, ``channel.MachineError`` (a full disk, a GPU
    that is gone: no candidate could go well) and KeyboardInterrupt pass through after the workers are gone, and
    everything measured until then is kept.
    """
    from sparsek_tune.tune.tuner import tune as run

    return run(
        problems, device, store, effort=effort, budget=budget, on_event=on_event, target=target, kernels=kernels,
        seed=seed, jobs=jobs, crew=crew,
    )  # fmt: skip


def join(
    store: Store,
    device: Device,
    *,
    wait: float = 0.0,
    suite: str | None = None,
    on_event: OnEvent | None = None,
    jobs: int | None = None,
) -> int:
    """Work at what others tune on ``device`` with the same kernel sources, until nothing of it is left and for ``wait``
    seconds nothing has come. suite: the name of the only one to join. Returns how many there were. Raises what
    :func:`tune` does, and ``studies.StudiesError`` where the studies cannot be used.
    """
    from sparsek_tune.tune.tuner import join as run

    return run(store, device, wait=wait, suite=suite, on_event=on_event, jobs=jobs)
