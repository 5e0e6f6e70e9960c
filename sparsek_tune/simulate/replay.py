"""One strategy run over one landscape, with configs in flight as the tuner has them, by a model of the clock."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.simulate.landscape import Landscape
from sparsek_tune.tune.search import WAITING

JOBS = 16  # compile processes
AHEAD = JOBS + WAITING  # configs in flight, as the tuner keeps them
COMPILE_SECONDS = {"forward": JOBS / 2.5}  # of one config in one process: 16 processes give 2 to 3 a second
OTHER_COMPILE_SECONDS = 5.0
_SPREAD = 2.0  # compile seconds lie between their usual value over this and times this

Thinking = Callable[[], float]


class Strategy(Protocol):
    """What is asked for configs. ``ask`` gives None where it has none now; with nothing in flight, it is over."""

    def ask(self) -> Config | None: ...

    def tell(self, config: Config, ms: float | None) -> None: ...


class Step(NamedTuple):
    """A measurement: of what, its time (ms, None without one), the best quality so far, seconds since the search began,
    and those of them that the strategy had thought."""

    config: Config
    ms: float | None
    quality: float
    seconds: float
    thinking: float


class Machine:
    """Compile processes, and one process that judges in the order of submission. All times in seconds."""

    def __init__(self, jobs: int) -> None:
        self._free = [0.0] * jobs
        self._judge_free = 0.0

    def compile(self, at: float, seconds: float) -> float:
        """When a config submitted ``at`` is compiled."""
        return self._push(max(at, heapq.heappop(self._free)) + seconds)

    def judge(self, at: float, seconds: float) -> float:
        """When a config handed over ``at`` is judged."""
        self._judge_free = max(at, self._judge_free) + seconds
        return self._judge_free

    def _push(self, end: float) -> float:
        heapq.heappush(self._free, end)
        return end


@dataclass
class Clock:
    """The search's time on a machine. The order of results is that of a strategy which thinks in no time, so that it is
    the same in every replay; the seconds are those of one that thinks as long as it was measured to: two machines, the
    ``ideal`` for order and the ``real`` for seconds, get the same work in the same order."""

    ideal: Machine
    real: Machine
    now: tuple[float, float] = (0.0, 0.0)
    thinking: float = 0.0
    _events: list[tuple[float, int, float, str, Config]] = field(default_factory=list)
    _count: int = 0

    @classmethod
    def of(cls, jobs: int) -> Clock:
        return cls(Machine(jobs), Machine(jobs))

    def think(self, seconds: float) -> None:
        self.now = (self.now[0], self.now[1] + seconds)
        self.thinking += seconds

    def submit(self, config: Config, compile_seconds: float) -> None:
        ends = self.ideal.compile(self.now[0], compile_seconds), self.real.compile(self.now[1], compile_seconds)
        self._push(ends, "compiled", config)

    def hand_over(self, config: Config, judge_seconds: float) -> None:
        ends = self.ideal.judge(self.now[0], judge_seconds), self.real.judge(self.now[1], judge_seconds)
        self._push(ends, "judged", config)

    def next(self) -> tuple[str, Config]:
        """Wait for what happens next: "compiled" or "judged", and which config."""
        ideal, _, real, kind, config = heapq.heappop(self._events)
        self.now = (max(self.now[0], ideal), max(self.now[1], real))
        return kind, config

    def _push(self, at: tuple[float, float], kind: str, config: Config) -> None:
        self._count += 1
        heapq.heappush(self._events, (at[0], self._count, at[1], kind, config))


def replay(
    strategy: Strategy,
    landscape: Landscape,
    trials: int,
    *,
    ahead: int = AHEAD,
    jobs: int = JOBS,
    seed: int = 0,
    thinking: Thinking = time.process_time,
) -> list[Step]:
    """The measurements of ``strategy``, at most ``trials``, in the order of their results.

    ahead: configs in flight at most; jobs: compile processes; seed: of the noise; thinking: a clock that counts the
    seconds which the strategy takes. As in the tuner the default is settled before all others; here that takes no time.
    """
    steps: list[Step] = []
    clock, asked, flying = Clock.of(jobs), 0, 0

    def timed(call: Callable[..., Any], *args: Any) -> Any:
        start = thinking()
        result = call(*args)
        clock.think(thinking() - start)
        return result

    def settle(config: Config) -> None:
        ms = landscape.measure(config, seed)
        best = max(steps[-1].quality if steps else 0.0, landscape.quality(config))
        steps.append(Step(config, ms, best, clock.now[1], clock.thinking))
        timed(strategy.tell, config, ms)

    while True:
        while asked < trials and flying < ahead and (config := timed(strategy.ask)) is not None:
            asked += 1
            if config == landscape.default and not steps and asked == 1:
                settle(config)
                continue
            flying += 1
            clock.submit(config, compile_seconds(landscape, config, seed))
        if not flying:
            return steps
        kind, config = clock.next()
        if kind == "compiled":
            launched = landscape.outcomes[config].status not in ("infeasible", "compile")
            clock.hand_over(config, landscape.judge_seconds if launched else 0.0)
        else:
            flying -= 1
            settle(config)


def compile_seconds(landscape: Landscape, config: Config, seed: int) -> float:
    """Of one process: the kernel's usual ones, times a factor by chance."""
    usual = COMPILE_SECONDS.get(landscape.kernel.name, OTHER_COMPILE_SECONDS)
    return usual * _SPREAD ** random.Random(f"compile {seed} {config.key}").uniform(-1.0, 1.0)
