"""What a sweep says of every config of a kernel at a problem."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import NamedTuple

from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem
from sparsek_tune.report.evidence import Attempt, Gpu, Search
from sparsek_tune.tune.search import STARTS

_QUANTILE = statistics.NormalDist().inv_cdf(0.975)  # half a 95 % interval, in standard deviations
_JUDGED = (0.02, 0.1)  # seconds that verifying and timing a compiled config takes: 10 to 50 a second


class Outcome(NamedTuple):
    """What became of a config. ms: its median in the sweep, None where it has no time (infeasible, failed); noise: the
    standard deviation of that median, as a part of it; true_ms: what counts when strategies are compared; stack: bytes
    a thread that its worst kernel spills."""

    status: str
    ms: float | None
    noise: float
    true_ms: float | None
    stack: int = 0


@dataclass(eq=False)
class Landscape:
    """The outcomes of a kernel's configs at one problem. space: how many configs exhaustive search looks at (those that
    pass the template's check); judge_seconds: what verifying and timing one takes; dropped: what the sweep says of
    configs that do not pass."""

    kernel: Template
    problem: Problem
    device: Device
    outcomes: Mapping[Config, Outcome]
    space: int
    judge_seconds: float
    dropped: Mapping[Config, Outcome] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kernel.name} {self.problem}"

    @property
    def complete(self) -> bool:
        return len(self.outcomes) >= self.space

    @cached_property
    def template(self) -> Template:
        """The kernel's, where configs that the sweep does not tell of cannot run."""

        def check(config: Config, problem: Problem, device: Device) -> str | None:
            why = self.kernel.check(config, problem, device)
            return why if why is not None or config in self.outcomes else "the sweep does not tell of it"

        return dataclasses.replace(self.kernel, check=check)

    @cached_property
    def default(self) -> Config:
        return self.kernel.default(self.problem, self.device)

    @cached_property
    def winner(self) -> Config:
        """The fastest config."""
        return min(
            (c for c, o in self.outcomes.items() if o.true_ms), key=lambda c: self.outcomes[c].true_ms or math.inf
        )

    def quality(self, config: Config) -> float:
        """The time of the winner over that of ``config``: 1 for the winner, 0 for what has no time."""
        mine, best = self.outcomes[config].true_ms, self.outcomes[self.winner].true_ms
        return best / mine if mine and best else 0.0

    def measure(self, config: Config, seed: int) -> float | None:
        """A time (ms) such as the sweep's protocol could have given, None where there is none. The same for equal
        seeds, whoever asks and whenever."""
        outcome = self.outcomes[config]
        if outcome.ms is None:
            return None
        return outcome.ms * max(0.5, random.Random(f"{seed} {config.key}").gauss(1.0, outcome.noise))


def landscapes(gpus: Iterable[Gpu]) -> tuple[list[Landscape], list[str]]:
    """Of every search for a kernel of this version whose default was timed; and why others are left out."""
    found, left_out = [], []
    for search in (s for gpu in gpus for s in gpu.searches):
        name = f"{search.kernel.name} {search.problem}"
        if search.kernel.template is None or not search.kernel.current:
            left_out.append(f"{name}: of another version of the kernel's source")
        elif search.default not in search.times:
            left_out.append(f"{name}: the default config has no time")
        else:
            found.append(_landscape(search, search.kernel.template))
    return found, left_out


def _landscape(search: Search, template: Template) -> Landscape:
    space = {c for c in template.configs() if template.check(c, search.problem, search.device) is None}
    true = _true(search)
    told = {
        config: Outcome(a.status, search.times.get(config), _noise(a), true.get(config), a.stack)
        for config, a in search.trials.items()
        if template.contains(config)
    }
    outcomes = {config: outcome for config, outcome in told.items() if config in space}
    dropped = {config: outcome for config, outcome in told.items() if config not in space}
    return Landscape(template, search.problem, search.device, outcomes, len(space), _judge_seconds(search), dropped)


def _true(search: Search) -> dict[Config, float]:
    """Times (ms) of the race where there are such; others are brought to the race's scale, by the contenders' median,
    and are not taken for faster than the fastest of the race, which the fastest of the sweep all took part in."""
    raced = {c: a.ms for c, a in search.race.items() if a.ms is not None and c in search.times}
    if not raced:
        return search.times
    scale, best = statistics.median(ms / search.times[c] for c, ms in raced.items()), min(raced.values())
    return {c: raced.get(c, max(best, ms * scale)) for c, ms in search.times.items()}


def _noise(attempt: Attempt) -> float:
    if attempt.ms is None or attempt.low is None or attempt.high is None:
        return 0.0
    return (attempt.high - attempt.low) / 2 / _QUANTILE / attempt.ms


def _judge_seconds(search: Search) -> float:
    """The median time between two results, within what is known of it: longer where the compiler set the pace."""
    at = [datetime.fromisoformat(a.at).timestamp() for a in search.trials.values()]
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    low, high = _JUDGED
    return min(high, max(low, statistics.median(gaps))) if gaps else low


def starts(landscape: Landscape, others: Sequence[Landscape]) -> list[Config]:
    """The winners of the same kernel at other problems on this GPU, the nearest problems first."""
    same = [o for o in others if o.kernel == landscape.kernel and o.device == landscape.device and o is not landscape]
    same.sort(key=lambda o: _differences(o.problem, landscape.problem))
    return [o.winner for o in same[:STARTS]]


def _differences(a: Problem, b: Problem) -> tuple[int, float]:
    """How many fields differ that a stored config must share; octaves of length."""
    hard = sum(x != y for x, y in ((a.dtype, b.dtype), (a.d, b.d), (a.g, b.g), (a.gate, b.gate)))
    return hard, abs(math.log2(max(a.n, 1) / max(b.n, 1)))
