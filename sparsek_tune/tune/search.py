"""One search: propose, compile, verify, measure, record; then race and choose."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, get_args

from sparsek_tune.db.store import Measured
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Problem
from sparsek_tune.tune import judge
from sparsek_tune.tune.measure import CLOSE_ENOUGH, Estimate, choose
from sparsek_tune.tune.pace import Pace
from sparsek_tune.tune.pool import Compiled, settled
from sparsek_tune.tune.propose import Proposals
from sparsek_tune.tune.record import FAILED, INFEASIBLE, WRONG
from sparsek_tune.tune.suite import Searching
from sparsek_tune.tune.types import Event, Part, Row, Spec, Trial

if TYPE_CHECKING:
    from sparsek_tune.tune.tuner import Run

OPENING = 10  # configs, besides the default, that are compiled by the time a search begins, if so many are in flight
_LEAST = 2.0  # seconds for the search of a kernel, however late it is
POLL = 0.2  # seconds between looks at what others do
STARTS = 4  # winners of other problems that a search begins with
WAITING = 2  # candidates that wait for a free compiler: more would be proposed without the results of those before


class Won(NamedTuple):
    """Winners of one template: those that may be served at a problem, best match first, and others of like problems,
    nearest first."""

    served: list[Config]
    far: list[Config]

    @property
    def starts(self) -> list[Config]:
        """What a search begins with."""
        return [*self.served, *self.far][:STARTS]


class Search:
    """The search for one template at one problem, made before its turn: what it begins with can be compiled by then.
    share: as ``Shares.of`` its problem; tell: others, who may help."""

    def __init__(
        self, run: Run, template: Template, problem: Problem, share: Callable[..., float],
        tell: Callable[[Searching], None] = lambda search: None,
    ) -> None:  # fmt: skip
        self.run, self.template, self.problem = run, template, problem
        self.key = problem.project(template.fields)
        self.ledger = run.ledger(template, problem)
        self.default = template.default(problem, run.device)
        self.seed = zlib.crc32(f"{run.seed} {template.name} {self.key}".encode())
        self._share, self._tell = share, tell
        self._starts = run.won(problem)[template.name].starts
        self._compiling: dict[str, list[Future[Compiled]]] = {}  # what follows, not what is in flight
        self._elsewhere: set[Config] = set()  # configs that others work at
        self.total = 0
        self.looked_at: int | None = None  # configs, where the ledger does not hold all of them (static tuning)
        self.pace = Pace()
        self._took: list[float] = []  # seconds to compile a config
        self._foreseen: Config | None = None  # as the winner
        self.likely = self.default  # the winner of the race
        self.passed: set[Config] = set()  # at the timed length, here
        self._raced: dict[Config, Estimate] = {}
        self._refuted = False  # the winner, by the small problems
        self._row: Row | None = None

    def begin(self) -> None:
        """Its turn has come: its time begins, and what won meanwhile stands beside it."""
        self.ledger.refresh()
        self.spec = self.beside(self.run.won(self.problem))
        self.end = time.monotonic() + self._share()

    def beside(self, won: Mapping[str, Won]) -> Spec:
        """What a worker sets up, with ``won`` of the other templates."""
        return self.run.spec(self.template, self.problem, won)

    def go(self) -> None:
        """All but the last word on the winner."""
        self.begin()
        proposals = self._proposals(self.seed, self.opening)
        stored = self.ledger.winner()
        before = self.ledger.count()
        self.emit("start", f"{before} of {self.total} configs known" if before else "")
        self.board = self.run.board(self.template, self.problem)
        if self.ledger.time(self.default) is None:
            compiled = self._set_up()
            judged = self.run.judge.submit(judge.measured, self, self.default, compiled, True)
            self.record(self.default, judged.result())
            self._took.append(compiled.seconds)
        elif self.total > before:
            self._set_up()
        if self.ledger.time(self.default) is None:
            self._compile("opening", [])
            self._fails("does not work")
            return
        race = self.run.effort.race_seconds  # is to fit into the share too
        self.end = time.monotonic() + self._share(_LEAST + race) - race
        if self.total > before:
            until = time.time() + self.end - time.monotonic()
            self._tell(Searching(self.template.name, self.problem, until, self.spec.companions))
        self._explore(proposals, leading=True)
        self._compile("opening", [])  # there is no time for more of it
        if stored is not None and self.ledger.count() == before and not self.ledger.unraced():  # the old race stands
            self.done(Config.from_key(stored.config), stored.default_ms, stored.tuned_ms, "as stored")
            return
        self._foresee(last=True)
        self._race()

    @property
    def ready(self) -> bool:
        """Whether ``confirm`` has nothing to wait for."""
        return not self._refuted and (self.likely == self.default or self.cases(self.likely).done())

    @property
    def settled(self) -> bool:
        return self._row is not None

    def confirm(self) -> None:
        """Serve what won the race, if it is right on the small problems too, which others are spared: their kernels are
        compiled while the next search goes on. If it is not, another race is to be held."""
        if self.likely == self.default or judge.right(self, self.likely):
            default, winner = self._raced[self.default], self._raced[self.likely]
            self.ledger.win(self.likely, default.median, winner.median)
            self.done(self.likely, default.median, winner.median, "")
        else:
            self.likely, self._refuted = self.default, True

    def settle(self) -> Row:
        """The outcome, whatever it takes."""
        while self._row is None:
            if self._refuted:
                self._refuted = False
                self._race(cases=True)
            else:
                self.confirm()
        return self._row

    def help(self, companions: Mapping[str, Config]) -> bool:
        """Take part in a search that another process drives, and races, beside ``companions``; whether there was
        anything to do."""
        self.begin()
        self.spec = self.spec._replace(companions=dict(companions))
        if self.ledger.time(self.default) is None:  # its driver is at it
            return False
        before = self.ledger.count()
        proposals = self._proposals(self.seed ^ os.getpid())
        if self.total <= before or time.monotonic() >= self.end:
            return False
        self.board = self.run.board(self.template, self.problem)
        self._set_up(leading=False)
        return self._explore(proposals, leading=False)

    @cached_property
    def opening(self) -> list[Config]:
        """What is tried first: the default, winners of like problems, and what the sampler asks for before it has
        results of others."""
        proposals = self._proposals(self.seed, [self.default, *self._starts])
        found = [self.default]
        while len(found) <= min(OPENING, self._most) and (config := proposals.ask()) is not None:
            if config == self.default:
                proposals.tell(config, 1.0)  # whatever it is, there is nothing to compare it with
            else:
                found.append(config)
        return found

    def compile_default(self, spec: Spec, *, early: bool = False) -> list[Future[Compiled]]:
        """Have compiled all that the measuring process runs before the first other candidate: setup, length, cases."""
        parts = [self.run.pool.submit(spec, self.default, part, early=early) for part in get_args(Part)]
        return self._compile("default", parts)

    def compile_opening(self, spec: Spec) -> None:
        """Have compiled what is tried first, the default aside."""
        self._compile("opening", [self.run.pool.submit(spec, config, early=True) for config in self.opening[1:]])

    def _compile(self, what: str, futures: list[Future[Compiled]]) -> list[Future[Compiled]]:
        """Note what was submitted, in place of what was before."""
        for future in set(self._compiling.get(what, ())).difference(futures):
            future.cancel()
        self._compiling[what] = futures
        return futures

    @property
    def _most(self) -> int:
        """Configs in flight."""
        return self.run.pool.jobs + WAITING

    def _set_up(self, *, leading: bool = True) -> Compiled:
        """Start the processes, and have compiled what the measuring process runs first; what became of the default."""
        self.run.pool.start()
        self.run.bench.start()
        setup, *parts = self.compile_default(self.spec)
        if leading:
            self.compile_opening(self.spec)
        self.run.foresee(self.problem)
        setup.result()  # where it is not ok the measuring process will say so
        return settled(parts)

    def _proposals(self, seed: int, first: Iterable[Config] = ()) -> Proposals:
        proposals = Proposals(
            self.template, self.problem, self.run.device, self.run.effort.trials,
            known=self.ledger.times(), first=first, seed=seed, sampler=self.run.effort.sampler,
        )  # fmt: skip
        self.total = proposals.total
        return proposals

    def _explore(self, proposals: Proposals, *, leading: bool) -> bool:
        """Keep the compile pool and the GPU busy and record what they deliver, until the space or the time is over;
        who leads waits for what others work at. Returns whether anything was tried here."""
        self.pace.begin(self.ledger.count())
        compiling: dict[Future[Compiled], Config] = {}
        judging: dict[Future[Measured], Config] = {}
        tried = False
        while time.monotonic() < self.end:
            while len(compiling) + len(judging) < self._most and (config := self._ask(proposals)) is not None:
                if config == self.default:  # settled first of all
                    proposals.tell(config, self.ledger.time(config))
                elif self._claim(proposals, config):
                    compiling[self.run.pool.submit(self.spec, config)] = config
                    tried = True
            if leading and not judging:
                self.run.settle()
            if not compiling and not judging:
                if not (leading and self._others(proposals)):
                    return tried
                time.sleep(POLL)
                continue
            left = max(0.0, self.end - time.monotonic())
            for future in wait([*judging, *compiling], timeout=left, return_when=FIRST_COMPLETED).done:
                if future in compiling:
                    config, compiled = compiling.pop(future), future.result()
                    self._took.append(compiled.seconds)
                    judging[self.run.judge.submit(judge.measured, self, config, compiled, False)] = config
                else:
                    config = judging.pop(future)
                    proposals.tell(config, self.record(config, future.result()))
                    if leading:
                        self._foresee()
        pending = {**compiling, **judging}
        cancelled = {future for future in pending if future.cancel()}
        for future in judging.keys() - cancelled:  # has begun: what it costs is spent
            self.record(judging.pop(future), future.result())
            pending.pop(future)
        for config in pending.values():
            self.board.drop(config)
        limit = time.monotonic() + self.run.effort.timeout  # others stop now, too
        while leading and time.monotonic() < limit and self._others(proposals):
            time.sleep(POLL)
        return tried

    def _foresee(self, *, last: bool = False) -> None:
        """Have compiled what comes after this search if what is fastest now wins, should that be clear or the ``last``
        word: what only chance put first is not worth the time."""
        ranking, default = self.ledger.ranking(), self.ledger.time(self.default) or math.inf
        clear = (self.ledger.best_ms or math.inf) < (1 - CLOSE_ENOUGH) * default
        likely = ranking[0] if clear else self.default
        if not last and (likely == self._foreseen or not clear):
            return
        self._foreseen, early = likely, not last
        winner = [likely] if likely != self.default else []
        self._compile("cases", [self.run.pool.submit(self.spec, c, "cases", early=early) for c in winner])
        self.run.foresee(self.problem, self.template, likely, early=early)

    def _claim(self, proposals: Proposals, config: Config) -> bool:
        """Whether this process is to try ``config``: nobody else tries it, or has tried it."""
        if not self.board.claim(config):
            self._elsewhere.add(config)
            return False
        if not self.board.quiet:
            self._learn(proposals)
            if config in self.ledger.latest:
                self.board.drop(config)
                return False
        return True

    def _learn(self, proposals: Proposals) -> None:
        """Take in what others have measured."""
        for config in self.ledger.refresh():
            proposals.tell(config, self.ledger.time(config))
            self._elsewhere.discard(config)

    def _others(self, proposals: Proposals) -> bool:
        """Whether others work at configs of this search, or gave some up that are now to be proposed again."""
        others = self.board.others()
        self._learn(proposals)
        abandoned = self._elsewhere - others
        for config in abandoned:
            proposals.again(config)
        self._elsewhere -= abandoned
        return bool(others or abandoned)

    def _ask(self, proposals: Proposals) -> Config | None:
        """The next config, unless it would not be compiled before the end if that takes as long as it did before. What
        the search begins with is compiled already."""
        took = sum(self._took) / max(1, len(self._took))
        if not proposals.beginning and time.monotonic() + took > self.end:
            return None
        return proposals.ask()

    def record(self, config: Config, result: Measured) -> float | None:
        """Record one attempt; its median (ms), or None."""
        self.ledger.add(config, result)
        median = self.ledger.time(config)
        self.board.settle(config, result.status, median)
        self.emit("trial", self._why(config), trial=Trial(config, result.status, median))
        return median

    def _race(self, *, cases: bool = False) -> None:
        """The default against the fastest others; only one that beats it there replaces it. cases: all are to be right
        on the small problems before."""
        finalists = judge.finalists(self, cases)
        self.emit("race", f"{len(finalists)} finalists against the default")
        self._raced = judge.contest(self, finalists)
        if self.default not in self._raced:
            self._fails("failed in the race")
            return
        others = [config for config in self._raced if config != self.default]
        index = choose(self._raced[self.default], [self._raced[c] for c in others])
        self.likely = self.default if index is None else others[index]

    def _fails(self, how: str) -> None:
        """The default does, so there is nothing to compare others with."""
        self.done(None, None, None, f"the default config {how}: {self._why(self.default)}")

    def cases(self, config: Config) -> Future[Compiled]:
        """``config`` compiled for the small problems."""
        return self.run.pool.submit(self.spec, config, "cases")

    def _why(self, config: Config) -> str:
        result = self.ledger.latest[config]
        return result.status if not result.reason else f"{result.status}: {result.reason}"

    def done(
        self, config: Config | None, default_ms: float | None, tuned_ms: float | None, message: str,
        tried: int | None = None,
    ) -> None:  # fmt: skip
        """This is the outcome: keep it, and tell. tried: where the ledger does not hold all that was."""
        speedup = default_ms / tuned_ms if default_ms and tuned_ms else None
        count = self.ledger.count
        self._row = Row(
            self.key, self.template.name, default_ms, tuned_ms, speedup, count() if tried is None else tried,
            count(INFEASIBLE), count(WRONG), count(FAILED), config,
        )  # fmt: skip
        self.emit("done", message, row=self._row)

    def emit(self, kind: str, message: str, *, trial: Trial | None = None, row: Row | None = None) -> None:
        done = self.ledger.count() if self.looked_at is None else self.looked_at
        total = max(self.total, done)
        rate = self.pace.rate(done) if kind == "trial" else None
        self.run.emit(Event(
            kind, self.template.name, self.key, done, total, self.ledger.best_ms, message,
            self.ledger.time(self.default), rate, self._left(kind, done, total), trial, row,
        ))  # fmt: skip

    def _left(self, kind: str, done: int, total: int) -> float | None:
        """Seconds until this search is over, its race included; None where nothing tells."""
        if kind == "done":
            return 0.0
        if self.run.device.static:  # compiling has no limit, and verifying follows
            left = self.pace.left(done, total, math.inf) or math.inf
            return left if math.isfinite(left) else None
        race = self.run.effort.race_seconds
        return race if kind == "race" else self.pace.left(done, total, self.end) + race
