"""How fast a run goes and when it will be over: from the rate so far, and never later than its limits. In seconds."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sparsek_tune.problem import Problem
from sparsek_tune.tune.types import Event

Clock = Callable[[], float]


class Pace:
    """The speed of one search from :meth:`begin` on: what was done before, and setting everything up, do not count."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[int, float] | None = None

    def begin(self, done: int) -> None:
        """The search sets out now, with ``done`` configs known."""
        self._began = (done, self._clock())

    def rate(self, done: int) -> float | None:
        """Configs a second, now that ``done`` are settled; None where none was settled yet."""
        if self._began is None:
            return None
        settled, seconds = done - self._began[0], self._clock() - self._began[1]
        return settled / seconds if settled > 0 and seconds > 0 else None

    def left(self, done: int, total: int, end: float) -> float:
        """Until ``total`` configs are settled, or ``end`` on the clock if that is earlier or nothing else is known."""
        limit, rate = max(0.0, end - self._clock()), self.rate(done)
        return limit if rate is None else min(limit, max(0, total - done) / rate)


class Shares:
    """What each kernel may take, so that those of one problem take ``limit`` together, setting up included, and the run
    is over at ``end`` on the clock.

    problems: of every kernel to tune, its problem.
    """

    def __init__(self, limit: float, end: float, problems: Iterable[Problem], clock: Clock = time.monotonic) -> None:
        self._limit, self._end, self._clock = limit, end, clock
        self._kernels = Counter(problems)
        self._limits: dict[Problem, float] = {}  # on the clock

    def of(self, problem: Problem, least: float = 0.0) -> float:
        """How long the next kernel of ``problem``, whose time begins with the first call, may take from now on: however
        late it is, ``least`` seconds."""
        now = self._clock()
        until = self._limits.setdefault(problem, now + self._limit)
        share = max((until - now) / self._kernels[problem], least)
        return min(share, max(0.0, self._end - now) / self._kernels.total())

    def done(self, problem: Problem) -> None:
        """A kernel of ``problem`` is done."""
        self._kernels[problem] -= 1


@dataclass
class _Running:
    start: float
    seen: float  # when ``left`` was told
    left: float | None
    searched: bool = False
    over: float = math.inf  # when its race is, while the next one may have begun

    def took(self, now: float) -> float:
        return min(now, self.over) - self.start


class Outlook:
    """The run as a whole, by the events of its searches, which may go on side by side.

    What is not begun is taken to last as long as the mean of what is done; stored results that are only looked up do
    not count there. limit: what a search takes; end: of the budget, on the clock.
    """

    def __init__(self, limit: float, end: float = math.inf, clock: Clock = time.monotonic) -> None:
        self.kernels = 0  # to tune
        self._limit, self._end, self._clock = limit, end, clock
        self._running: dict[tuple[str, Problem], _Running] = {}
        self._took: list[float] = []
        self._done, self._lanes = 0, 1

    def see(self, event: Event) -> Event:
        """``event`` with what it says of the run."""
        now, key = self._clock(), (event.template, event.problem)
        if event.kind == "done":
            one = self._running.pop(key, None)
            self._done += 1
            if one is not None and one.searched:
                self._took.append(one.took(now))
        elif event.kind != "note":
            one = self._running.setdefault(key, _Running(now, now, None))
            one.seen, one.left, one.searched = now, event.seconds_left, one.searched or event.kind == "trial"
            if event.kind == "start":
                one.over = math.inf
            elif event.kind == "race":
                one.over = min(one.over, now + (event.seconds_left or 0.0))
            self._lanes = max(self._lanes, sum(r.over == math.inf for r in self._running.values()))
        return event._replace(kernels_done=self._done, kernels=self.kernels, run_seconds_left=self._left(now))

    def _left(self, now: float) -> float:
        running = [(r.took(now), self._left_of(r, now)) for r in self._running.values()]
        lefts = [left for _, left in running]
        samples = self._took or [elapsed + left for elapsed, left in running] or [self._limit]
        ahead = max(0, self.kernels - self._done - len(running)) * sum(samples) / len(samples)
        longest = max(lefts, default=0.0)
        return min(max(longest, (sum(lefts) + ahead) / self._lanes), max(longest, self._end - now, 0.0))

    def _left_of(self, one: _Running, now: float) -> float:
        if one.left is None:
            return max(0.0, one.start + self._limit - now)
        return max(0.0, one.seen + one.left - now)
