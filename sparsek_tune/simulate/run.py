"""All replays that are asked for, by several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from sparsek_tune.simulate import strategies
from sparsek_tune.simulate.landscape import Landscape, starts
from sparsek_tune.simulate.replay import AHEAD, Step, replay
from sparsek_tune.simulate.results import result

STARTS = ("cold", "warm", "blind")
TRIALS = 100  # measurements of a replay


@dataclass(frozen=True)
class Settings:
    """Of every replay. trials: measurements at most, which exhaustive search does not heed; ahead: configs in flight;
    start: what is looked at first: "cold" the default, "warm" the winners at other problems too, "blind" nothing."""

    seeds: int = 20
    trials: int = TRIALS
    ahead: int = AHEAD
    start: str = "cold"

    def trials_of(self, strategy: str, space: int) -> int:
        return space if strategy == "exhaustive" else min(space, self.trials)


# What the processes were forked with: a landscape holds functions, which cannot be sent.
_shared: tuple[Sequence[Landscape], Settings] = ((), Settings())


def replays(
    landscapes: Sequence[Landscape], names: Sequence[str], settings: Settings, jobs: int = 1
) -> Iterator[dict[str, Any]]:
    """The result of every strategy of ``names`` at every landscape, as they come, in order."""
    global _shared
    _shared = (landscapes, settings)
    work = [(name, i) for name in names for i in range(len(landscapes))]
    if jobs == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(_result, work)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _single_threaded) as pool:
        try:
            yield from pool.map(_result, work)
        finally:
            pool.shutdown(cancel_futures=True)


def _single_threaded() -> None:
    """Processes share the CPUs already."""
    import torch

    torch.set_num_threads(1)


def _result(work: tuple[str, int]) -> dict[str, Any]:
    name, place = work
    landscapes, settings = _shared
    landscape = landscapes[place]
    runs = [one(name, landscape, landscapes, settings, seed) for seed in range(settings.seeds)]
    return result(name, landscape, runs, {"ahead": settings.ahead, "start": settings.start})


def one(name: str, landscape: Landscape, others: Sequence[Landscape], settings: Settings, seed: int) -> list[Step]:
    """One replay."""
    first = [] if settings.start == "blind" else [landscape.default]
    if settings.start == "warm":
        first += starts(landscape, others)
    trials = settings.trials_of(name, landscape.space)
    with strategies.made(name, landscape, trials, first, seed) as strategy:
        return replay(strategy, landscape, trials, ahead=settings.ahead, seed=seed)
