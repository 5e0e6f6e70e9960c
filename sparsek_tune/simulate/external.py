"""Helion's search algorithms, through its interface for kernels that are not its own (``helion.autotuner.autotune``).

A search there calls for the times of a batch of configs and waits. So it runs in a thread of its own, and its batches
are handed out config by config.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Thread
from typing import Any

from sparsek_tune.kernel_templates.base import Config, Pow2
from sparsek_tune.simulate.landscape import Landscape
from sparsek_tune.tune.space import normal

# What Helion's effort "quick" asks of them: some 60 to 200 measurements.
_PATTERN = {"initial_population": 30, "copies": 2, "max_generations": 5}
_EVOLUTION = {"population_size": 20, "max_generations": 8, "immediate_update": False}  # a generation at once
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "helion-pattern": ("PatternSearch", _PATTERN),
    "helion-lfbo": ("LFBOTreeSearch", _PATTERN),
    "helion-de": ("DifferentialEvolutionSearch", _EVOLUTION),
}


def missing_packages() -> list[str]:
    """What is needed and not installed."""
    return [] if find_spec("helion") else ["helion"]


class _Abandoned(BaseException):
    """Ends a search that nobody asks any more."""


class Helion:
    """One of its algorithms over ``landscape``, from its own default population, in which ``first`` stand first.

    What the template's check refuses, and what was measured before, is answered at once and not handed out.
    """

    def __init__(self, name: str, landscape: Landscape, first: Sequence[Config], seed: int) -> None:
        import_module("helion.autotuner")  # not counted as thinking
        self._landscape = landscape
        self._known: dict[Config, float] = {}
        self._waiting: list[Config] = []  # of the batch: not asked for yet
        self._open: set[Config] = set()  # asked for and not told
        self._over = False
        self._batches: SimpleQueue[list[Config] | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[bool] = SimpleQueue()
        self._thread = Thread(target=self._run, args=(name, first, seed), daemon=True)
        self._started = False

    def ask(self) -> Config | None:
        while not self._waiting:
            if self._open or self._over:
                return None
            self._next_batch()
        config = self._waiting.pop(0)
        self._open.add(config)
        return config

    def tell(self, config: Config, ms: float | None) -> None:
        self._open.discard(config)
        self._known[config] = math.inf if ms is None else ms

    def close(self) -> None:
        """End the search, wherever it is."""
        if self._started and not self._over:
            self._answers.put(False)
            self._thread.join()
        self._over, self._waiting = True, []

    def _next_batch(self) -> None:
        if self._started:
            self._answers.put(True)
        else:
            self._started = True
            self._thread.start()
        batch = self._batches.get()
        if isinstance(batch, BaseException):
            self._over = True
            raise batch
        if batch is None:
            self._over = True
        else:
            self._waiting = batch

    def _run(self, name: str, first: Sequence[Config], seed: int) -> None:
        try:
            _search(name, self._landscape, first, seed, self._times)
            self._batches.put(None)
        except _Abandoned:
            pass
        except BaseException as error:
            self._batches.put(error)

    def _times(self, configs: Sequence[Config]) -> list[float]:
        """Called by the search: the times (ms) of a batch, infinity where there is none."""
        template, problem, device = self._landscape.template, self._landscape.problem, self._landscape.device
        runnable = {c for c in configs if template.check(c, problem, device) is None}
        unknown = [c for c in dict.fromkeys(configs) if c in runnable and c not in self._known]
        if unknown:
            self._batches.put(unknown)
            if not self._answers.get():
                raise _Abandoned
        return [self._known.get(c, math.inf) for c in configs]


def _search(name: str, landscape: Landscape, first: Sequence[Config], seed: int, times: Any) -> None:
    """Run the algorithm; ``times`` answers for a batch of configs."""
    import torch
    from helion.autotuner import EnumFragment, PowerOfTwoFragment, autotune, search_algorithms
    from helion.autotuner.benchmark_provider import BenchmarkProvider, BenchmarkResult

    template = landscape.template
    start = first[0] if first else next(template.feasible(landscape.problem, landscape.device))

    class Provider(BenchmarkProvider):
        """Answers from the landscape: nothing is compiled, nothing is launched."""

        def __init__(self, **_: Any) -> None:
            self.mutated_arg_indices = ()

        def setup(self) -> None:
            pass

        def cleanup(self) -> None:
            pass

        def benchmark(self, configs: list[Any], **_: Any) -> list[BenchmarkResult]:
            found = times([normal(template, dict(c)) for c in configs])
            return [
                BenchmarkResult(config, _nothing, ms, "ok" if math.isfinite(ms) else "error", None)
                for config, ms in zip(configs, found, strict=True)
            ]

        def benchmark_isolated(self, fns: list[Any], **_: Any) -> list[None]:
            return [None] * len(fns)  # keep the first time: another would be the same

    algorithm, arguments = ALGORITHMS[name]

    class Replayed(search_algorithms[algorithm]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._benchmark_provider_cls = Provider

        def final_rebenchmark_best(self, best: Any) -> Any:
            return best  # times finalists on a GPU

    def fragment(param: Any) -> Any:
        values = param.domain.values
        if isinstance(param.domain, Pow2):
            return PowerOfTwoFragment(values[0], values[-1], start[param.name])
        return EnumFragment((start[param.name], *(v for v in values if v != start[param.name])))

    search_algorithms[Replayed.__qualname__] = Replayed
    autotune(
        {param.name: fragment(param) for param in template.space}, lambda config: _nothing, (),
        algorithm=Replayed.__qualname__, device=torch.device("cpu"), autotune_random_seed=seed,
        autotune_seed_configs=[dict(c) for c in first[1:]], autotune_progress_bar=False, autotune_log_level=0,
        autotune_effort="quick", **arguments,
    )  # fmt: skip


def _nothing(*_: Any) -> None:
    pass
