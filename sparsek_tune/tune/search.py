"""One search: propose, compile, verify, measure, record; then race and choose."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsek_tune.db.store import Measured
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Problem
from sparsek_tune.tune.channel import WorkerError
from sparsek_tune.tune.measure import PROTOCOL, Estimate, choose
from sparsek_tune.tune.pace import Pace
from sparsek_tune.tune.pool import Compiled, settled
from sparsek_tune.tune.propose import Proposals
from sparsek_tune.tune.record import FAILED, INFEASIBLE, WRONG, failed, timed
from sparsek_tune.tune.suite import Searching
from sparsek_tune.tune.types import Event, Row, Trial

if TYPE_CHECKING:
    from sparsek_tune.tune.tuner import Run

_HOPELESS = 1.5  # a candidate whose whole interval lies above this multiple of the best is not sampled further
_LEAST = 5.0  # seconds for the search of a kernel of which no winner is known nearby
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
    """The search for one template at one problem. share: as ``Shares.of`` its problem; tell: others, who may help."""

    def __init__(
        self, run: Run, template: Template, problem: Problem, share: Callable[..., float],
        tell: Callable[[Searching], None] = lambda search: None,
    ) -> None:  # fmt: skip
        self.run, self.template, self.problem = run, template, problem
        self.key = problem.project(template.fields)
        self.ledger = run.ledger(template, problem)
        self.default = template.default(problem, run.device)
        won = run.won(problem)
        self.spec = run.spec(template, problem, won)
        self.seed = zlib.crc32(f"{run.seed} {template.name} {self.key}".encode())
        self._share, self._tell = share, tell
        self._elsewhere: set[Config] = set()  # configs that others work at
        self.end = time.monotonic() + share()
        self.total = 0
        self.looked_at: int | None = None  # configs, where the ledger does not hold all of them (static tuning)
        self.pace = Pace()
        self._starts = won[template.name].starts
        self._took: list[float] = []  # seconds to compile a config
        self._foreseen: tuple[Config, list[Config]] | None = None

    def go(self) -> Row:
        proposals = self._proposals(self.seed, [self.default, *self._starts])
        stored = self.ledger.winner()
        before = self.ledger.count()
        self.emit("start", f"{before} of {self.total} configs known" if before else "")
        self.board = self.run.board(self.template, self.problem)
        if self.ledger.time(self.default) is None:
            compiled = self._set_up()
            self._record(self.default, self.run.judge.submit(self._judge, self.default, compiled, True).result())
            # Where nothing is known that won nearby, something has to be looked at, however long setting up took.
            self.end = min(time.monotonic() + self._share(0.0 if self._starts else _LEAST), self.run.end)
            self._took.append(compiled.seconds)
        elif self.total > before:
            self._set_up()
        if self.ledger.time(self.default) is None:
            return self.row(None, None, None, f"the default config does not work: {self._why(self.default)}")
        if self.total > before:
            self._tell(Searching(self.template.name, self.problem, time.time() + self.end - time.monotonic()))
        self._explore(proposals, leading=True)
        if stored is not None and self.ledger.count() == before and not self.ledger.unraced():  # the old race stands
            return self.row(Config.from_key(stored.config), stored.default_ms, stored.tuned_ms, "as stored")
        return self._race()

    def help(self) -> bool:
        """Take part in a search that another process drives, and races; whether there was anything to do."""
        if self.ledger.time(self.default) is None:  # its driver is at it
            return False
        before = self.ledger.count()
        proposals = self._proposals(self.seed ^ os.getpid())
        if self.total <= before or time.monotonic() >= self.end:
            return False
        self.board = self.run.board(self.template, self.problem)
        self._set_up()
        return self._explore(proposals, leading=False)

    def _set_up(self) -> Compiled:
        """Start the processes, and have compiled what the measuring process runs first; what became of the default."""
        self.run.pool.start()
        self.run.bench.start()
        setup, *parts = self.run.compile_default(self.spec)
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
        most = self.run.pool.jobs + WAITING
        compiling: dict[Future[Compiled], Config] = {}
        judging: dict[Future[Measured], Config] = {}
        tried = False
        while time.monotonic() < self.end:
            while len(compiling) + len(judging) < most and (config := self._ask(proposals)) is not None:
                if config == self.default:  # settled first of all
                    proposals.tell(config, self.ledger.time(config))
                elif self._claim(proposals, config):
                    compiling[self.run.pool.submit(self.spec, config)] = config
                    tried = True
            if leading and len(compiling) + len(judging) < most:  # nothing more to propose, and processes idle
                self._foresee()
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
                    judging[self.run.judge.submit(self._judge, config, compiled, False)] = config
                else:
                    config = judging.pop(future)
                    proposals.tell(config, self._record(config, future.result()))
        pending = {**compiling, **judging}
        cancelled = {future for future in pending if future.cancel()}
        for future in judging.keys() - cancelled:  # has begun: what it costs is spent
            self._record(judging.pop(future), future.result())
            pending.pop(future)
        for config in pending.values():
            self.board.drop(config)
        limit = time.monotonic() + self.run.effort.timeout  # others stop now, too
        while leading and time.monotonic() < limit and self._others(proposals):
            time.sleep(POLL)
        return tried

    def _foresee(self) -> None:
        """Have compiled what comes after this search, as far as its best so far tell."""
        ranking = self.ledger.ranking()
        best = [c for c in ranking if c != self.default][: self.run.effort.finalists]
        if (ranking[0], best) == self._foreseen:
            return
        self._foreseen = ranking[0], best
        for config in best:
            self.run.pool.submit(self.spec, config, "cases")
        self.run.foresee(self.problem, self.template, ranking[0])

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

    def _judge(self, config: Config, compiled: Compiled, cases: bool) -> Measured:
        """Verify and time one compiled candidate. cases: see ``Stage.verify``; finalists meet theirs later on."""
        spent = {"compile_seconds": round(compiled.seconds, 3)}
        protocol = {**PROTOCOL, "kernels": [k._asdict() for k in compiled.kernels], **spent}
        if (wrong := self._wrong(config, compiled, cases, protocol)) is not None:
            return wrong
        best = self.ledger.best_ms
        hopeless, seconds = math.inf if best is None else _HOPELESS * best, self.run.effort.sample_seconds
        try:
            return timed(self.run.bench.measure(self.spec, config, seconds, hopeless), protocol)
        except WorkerError as error:
            return failed(error.status, str(error), protocol)

    def _wrong(
        self, config: Config, compiled: Compiled, cases: bool, protocol: Mapping[str, Any]
    ) -> Measured | None:  # fmt: skip
        """What is to be recorded of a config that does not compile or is not right, or None."""
        if compiled.status != "ok":
            return failed(compiled.status, compiled.reason, protocol)
        try:
            wrong = self.run.bench.verify(self.spec, config, cases)
        except WorkerError as error:
            return failed(error.status, str(error), protocol)
        return None if wrong is None else failed("wrong", wrong, protocol)

    def _record(self, config: Config, result: Measured) -> float | None:
        """Record one attempt; its median (ms), or None."""
        self.ledger.add(config, result)
        median = self.ledger.time(config)
        self.board.settle(config, result.status, median)
        self.emit("trial", self._why(config), trial=Trial(config, result.status, median))
        return median

    def _race(self) -> Row:
        """The default against the fastest others; only one that beats it there replaces it."""
        finalists = self._finalists()
        self.emit("race", f"{len(finalists)} finalists against the default")
        results = self._contest(finalists)
        if self.default not in results:
            return self.row(None, None, None, f"the default config failed in the race: {self._why(self.default)}")
        default = results.pop(self.default)
        others = list(results)
        index = choose(default, [results[c] for c in others])
        winner, best = (self.default, default) if index is None else (others[index], results[others[index]])
        self.ledger.win(winner, default.median, best.median)
        return self.row(winner, default.median, best.median, "")

    def _finalists(self) -> list[Config]:
        """The fastest that are right on the small problems too. Most candidates are far from this, and are spared the
        compilation of a second set of kernels."""
        ranking = [c for c in self.ledger.ranking() if c != self.default]
        found: list[Config] = []
        while ranking and (places := self.run.effort.finalists - len(found)) > 0:
            best, ranking = ranking[:places], ranking[places:]
            parts = {c: [self.run.pool.submit(self.spec, c, part) for part in ("length", "cases")] for c in best}
            for config, futures in parts.items():
                wrong = self._wrong(config, settled(futures), True, PROTOCOL)
                if wrong is None:
                    found.append(config)
                else:
                    self._record(config, wrong)
        return found

    def _contest(self, finalists: list[Config]) -> dict[Config, Estimate]:
        """Race results, all recorded. Where the race breaks, each finalist meets the default alone, to tell who."""
        everyone = [self.default, *finalists]
        try:
            results = dict(zip(everyone, self._race_once(everyone), strict=True))
        except WorkerError as error:
            if not finalists:
                self._fail(self.default, error)
                return {}
            if len(finalists) == 1:
                self._fail(finalists[0], error)
                return self._contest([])
            survivors = [c for c in finalists if c in self._contest([c])]
            return self._contest(survivors) if len(survivors) < len(finalists) else self._contest(survivors[:1])
        for config, result in results.items():
            self.ledger.add(config, timed(result, {**PROTOCOL, "phase": "race", "contenders": len(everyone)}))
        return results

    def _race_once(self, configs: list[Config]) -> list[Estimate]:
        return self.run.bench.race(self.spec, configs, self.run.effort.race_seconds, self.seed)

    def _fail(self, config: Config, error: WorkerError) -> None:
        self.ledger.add(config, failed(error.status, f"in the race: {error}", PROTOCOL))

    def _why(self, config: Config) -> str:
        result = self.ledger.latest[config]
        return result.status if not result.reason else f"{result.status}: {result.reason}"

    def row(
        self, config: Config | None, default_ms: float | None, tuned_ms: float | None, message: str,
        tried: int | None = None,
    ) -> Row:  # fmt: skip
        """The outcome, announced. tried: where the ledger does not hold all that was."""
        speedup = default_ms / tuned_ms if default_ms and tuned_ms else None
        count = self.ledger.count
        row = Row(
            self.key, self.template.name, default_ms, tuned_ms, speedup, count() if tried is None else tried,
            count(INFEASIBLE), count(WRONG), count(FAILED), config,
        )  # fmt: skip
        self.emit("done", message, row=row)
        return row

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
