"""The run: for every problem and template propose, compile, verify, measure, record; then race and choose."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any

from sparsek_tune import dispatch
from sparsek_tune.db import reader
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem, target_device
from sparsek_tune.tune import static
from sparsek_tune.tune.bench import Bench
from sparsek_tune.tune.board import Board
from sparsek_tune.tune.channel import WorkerError
from sparsek_tune.tune.compile import Compiled, CompilePool
from sparsek_tune.tune.measure import PROTOCOL, Estimate, choose
from sparsek_tune.tune.pace import Outlook, Pace, Shares
from sparsek_tune.tune.propose import Proposals
from sparsek_tune.tune.record import FAILED, INFEASIBLE, WRONG, Ledger, failed, timed
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.studies import Studies, StudiesError
from sparsek_tune.tune.suite import Searching, Suite, Task, again, tasks
from sparsek_tune.tune.types import EFFORTS, Event, OnEvent, Row, Spec, Trial

_HOPELESS = 1.5  # a candidate whose whole interval lies above this multiple of the best is not sampled further
_LEAST = 5.0  # seconds for the search of a kernel of which no winner is known nearby
_WAITING = 2  # candidates that wait for a free compiler: more would be proposed without the results of those before
_POLL = 0.2  # seconds between looks at what others do
_STARTS = 4  # winners of other problems that a search begins with


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
    crew: Callable[[Suite, OnEvent], AbstractContextManager[Any]] | None = None,
    templates: Mapping[str, Template] = TEMPLATES,
    factory: str = FACTORY,
) -> list[Row]:
    """See :func:`sparsek_tune.tune.tune`. crew: the context in which others work at the suite too; templates, factory:
    what is tuned and how a worker sets it up, for tests."""
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, but is {effort!r}")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be above 0 seconds, but is {budget}")
    device = target_device(target) if target is not None else device
    if device is None:
        raise ValueError("device must be given where target is None, but is None")
    if unknown := sorted(set(kernels or ()) - templates.keys()):
        raise ValueError(f"kernels must be of {', '.join(templates)}, but names {', '.join(unknown)}")
    work = tasks(list(problems), [t for t in templates.values() if not kernels or t.name in kernels])
    about = {"effort": effort, "seed": seed, "until": None if budget is None else time.time() + budget}
    with _begun(device, store, templates, about, on_event, factory, jobs) as run:
        return run.tune(work, about, crew)


def join(
    store: Store,
    device: Device,
    *,
    wait: float = 0.0,
    suite: str | None = None,
    on_event: OnEvent | None = None,
    jobs: int | None = None,
    templates: Mapping[str, Template] = TEMPLATES,
    factory: str = FACTORY,
) -> int:
    """See :func:`sparsek_tune.tune.join`."""
    last, done = time.monotonic(), 0
    with closing(Studies.of(store.where, again)) as shared:
        while True:
            found = [Suite(shared, suite)] if suite else Suite.joinable(shared, device, templates)
            for one in found:
                with _begun(device, store, templates, one.about, on_event, factory, jobs, shared) as run:
                    run.work(one)
                last, done = time.monotonic(), done + 1
            if suite or (not found and time.monotonic() >= last + wait):
                return done
            if not found:
                time.sleep(min(_POLL, max(0.0, last + wait - time.monotonic())))


@contextmanager
def _begun(
    device: Device, store: Store, templates: Mapping[str, Template], about: Mapping[str, Any], on_event: OnEvent | None,
    factory: str, jobs: int | None, shared: Studies | None = None,
) -> Iterator[Run]:  # fmt: skip
    """A run, noted in the store with its end."""
    number = store.start_run(" ".join(sys.argv))
    outcome = "failed"
    try:
        with ExitStack() as stack:
            problem = None
            if shared is None:
                try:
                    shared = stack.enter_context(closing(Studies.of(store.where, again)))
                except StudiesError as error:
                    problem = str(error)
            run = stack.enter_context(Run(device, store, number, templates, about, on_event, factory, jobs, shared))
            if problem is not None:
                run.note(f"{problem}; this process works by itself")
            yield run
        outcome = "done"
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        store.finish_run(number, outcome)


class Run:
    """One tuning run: the processes it keeps, the time it has, the winners so far."""

    def __init__(
        self,
        device: Device,
        store: Store,
        run: int,
        templates: Mapping[str, Template],
        about: Mapping[str, Any],
        on_event: OnEvent | None,
        factory: str,
        jobs: int | None,
        shared: Studies | None,
    ) -> None:
        effort, until = EFFORTS[about["effort"]], about["until"]
        self.device, self.templates, self.effort, self.seed = device, templates, effort, about["seed"]
        self._store, self._run, self._on_event, self._studies = store, run, on_event, shared
        self._emitting = threading.Lock()
        self._rows: dict[tuple[str, Problem], Row] = {}
        self.end = math.inf if until is None else time.monotonic() + until - time.time()
        self._outlook = Outlook(effort.seconds / len(templates), self.end)
        self._ahead: defaultdict[Problem, list[tuple[Spec, Config, Future[Compiled]]]] = defaultdict(list)
        self.pool = CompilePool(factory, jobs, timeout=effort.timeout)
        self.bench = Bench(factory, "interpret" if device.static else "measure", effort.timeout)
        # One thread, for one measuring process: the GPU works on while results are recorded and configs proposed.
        self.judge = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self.verified: dict[tuple[str, Config, Problem], tuple[str, str]] = {}  # of static tuning

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # each, whatever happens to the others; the last first
            stack.callback(self.judge.shutdown)
            stack.callback(self.pool.close)
            stack.callback(self.bench.close)
            stack.callback(self.judge.shutdown, wait=False, cancel_futures=True)

    def tune(
        self, work: list[Task], about: Mapping[str, Any],
        crew: Callable[[Suite, OnEvent], AbstractContextManager[Any]] | None,
    ) -> list[Row]:  # fmt: skip
        """Tune every kernel of ``work``, together with whoever joins; the rows in its order."""
        keys = [(name, problem.project(self.templates[name].fields)) for problem, names in work for name in names]
        self._outlook.kernels = len(keys)
        try:
            if self._studies is not None:
                suite = Suite.create(self._studies, self.device, self.templates, work, {**about, "kernels": len(keys)})
                try:
                    with crew(suite, self.emit) if crew is not None else nullcontext():
                        self.work(suite)
                finally:
                    suite.withdraw()  # what is left of it, after an interrupt or the end of the budget
                for row in suite.rows():
                    if (row.template, row.problem) not in self._rows:
                        self.emit(Event("done", row.template, row.problem, row.tried, row.tried, None, "", row=row))
        except StudiesError as error:
            self.note(f"{error}; this process goes on by itself")
            self._studies = None
        for at, (problem, names) in enumerate(work):
            left = [n for n in names if (n, problem.project(self.templates[n].fields)) not in self._rows]
            if left:
                ahead = sum(len(names) for _, names in work[at + 1 :])
                self._drive(problem, left, ahead, lambda search: None)
        if missing := [key for key in keys if key not in self._rows]:
            self.emit(Event("note", *missing[0], 0, 0, None, f"the budget is spent: {len(missing)} kernels not tuned"))
        return [self._rows[key] for key in keys if key in self._rows]

    def work(self, suite: Suite) -> None:
        """Drive problems of the suite and help where others are, until it is over. Raises StudiesError."""
        self._outlook.kernels = self._outlook.kernels or suite.about["kernels"]
        while time.monotonic() < self.end:
            if (taken := suite.take()) is not None:
                claim, (problem, names) = taken
                waiting, lanes = suite.ahead()
                done = self._drive(problem, names, math.ceil(waiting / lanes), partial(suite.searching, claim))
                suite.finish(claim, done)
            elif suite.over():
                return
            elif not any(self._help(search) for search in suite.searches()):
                time.sleep(_POLL)

    def _drive(
        self, problem: Problem, names: Iterable[str], ahead: int, tell: Callable[[Searching], None]
    ) -> list[Row]:
        """Tune kernels of one problem, in tuning order; ahead: how many more this process has to expect."""
        templates = [t for t in self.templates.values() if t.name in set(names)]
        limit = math.inf if self.device.static else self.effort.seconds  # static tuning looks at few configs anyway
        later = problem._replace(n=0)
        shares = Shares(limit, self.end, [*[problem] * len(templates), *[later] * ahead])
        rows = []
        for template in templates:
            if time.monotonic() >= self.end:
                break
            search = Search(self, template, problem, partial(shares.of, problem), tell)
            rows.append(static.search(search) if self.device.static else search.go())
            shares.done(problem)
        return rows

    def _help(self, what: Searching) -> bool:
        """Take part in a search that another process drives; whether there was anything to do."""
        if self.device.static:  # nothing is measured, and compiling is shared by problems alone
            return False
        seconds = max(0.0, min(what.until - time.time(), self.end - time.monotonic()))
        search = Search(self, self.templates[what.template], what.problem, lambda least=0.0: seconds)
        return search.help()

    def board(self, template: Template, problem: Problem) -> Board:
        return Board(self._studies, self.device, template, problem, self.note)

    def compile_first(self, problem: Problem) -> None:
        """Compile every default at once: the measuring process, which needs all of them, then only loads them. What
        searches begin with follows, while the first of them is judged."""
        if problem in self._ahead:
            return
        self.pool.start()
        self.bench.start()
        needed, starts = [], []
        for t in self.templates.values():
            spec = Spec(t.name, problem, self.device, self.companions(t, problem))
            default = t.default(problem, self.device)
            needed.append((spec, default))
            needed += [(spec, config) for config in self._won(t, problem)[0][:1]]
            starts += [(spec, config) for config in self.starts(t, problem)]
        ahead = self._ahead[problem]
        for spec, config in needed + starts:
            if self._compiled(spec, config) is None:
                ahead.append((spec, config, self.pool.submit(spec, config)))
        wait([future for spec, config, future in ahead if (spec, config) in needed])

    def compile(self, spec: Spec, config: Config, cases: bool) -> Future[Compiled]:
        """As ``CompilePool.submit``, but that nothing is compiled again that :meth:`compile_first` compiled."""
        return self._compiled(spec, config) or self.pool.submit(spec, config, cases)

    def _compiled(self, spec: Spec, config: Config) -> Future[Compiled] | None:
        known = (future for *job, future in self._ahead[spec.problem] if job == [spec, config])
        return next((future for future in known if not future.cancelled()), None)

    def companions(self, template: Template, problem: Problem) -> dict[str, Config]:
        """What is served for the other templates; for ``template`` itself the default."""
        defaults = {t.name: t.default(problem, self.device) for t in self.templates.values()}
        served = {t.name: self._won(t, problem)[0] for t in self.templates.values() if t.name != template.name}
        return defaults | {name: configs[0] for name, configs in served.items() if configs}

    def starts(self, template: Template, problem: Problem) -> list[Config]:
        """What won for ``template`` at the nearest problems, here and as shipped, nearest first, some of them too far
        away to be served."""
        served, far = self._won(template, problem)
        return [*served, *far][:_STARTS]

    def _won(self, template: Template, problem: Problem) -> tuple[list[Config], list[Config]]:
        """Winners that may be served at ``problem``, best match first, and others of like problems, nearest first."""
        stored = [*self._store.winners(), *reader.load_shipped(self.device.kind, self.device.cc).entries]
        ranked = dispatch.candidates(template, problem, self.device, stored)
        like = [
            c for c in ranked
            # A GPU's kernels do not run beside what no GPU has run.
            if (self.device.static or not c.entry.static)
            and not dispatch.foreign(c.entry, template, problem, self.device)
            and not dispatch.unusable(c.entry, template, problem, self.device)
        ]  # fmt: skip
        served = list(dict.fromkeys(Config.from_key(c.entry.config) for c in like if not c.refused))
        far = dict.fromkeys(Config.from_key(c.entry.config) for c in like if c.refused)
        return served, [config for config in far if config not in served]

    def ledger(self, template: Template, problem: Problem) -> Ledger:
        return Ledger(self._store, self.device, template, problem, self._run)

    def note(self, message: str) -> None:
        """Tell the user something that is about no kernel."""
        self.emit(Event("note", "studies", Problem("", 0, 0, "", 0, 0, 0, 0), 0, 0, None, message))

    def emit(self, event: Event) -> None:
        """From any thread."""
        with self._emitting:
            if event.row is not None:
                self._rows[event.template, event.problem] = event.row
            event = self._outlook.see(event)
            if self._on_event is not None:
                self._on_event(event)


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
        self.spec = Spec(template.name, problem, run.device, run.companions(template, problem))
        self.seed = zlib.crc32(f"{run.seed} {template.name} {self.key}".encode())
        self._share, self._tell = share, tell
        self._elsewhere: set[Config] = set()  # configs that others work at
        self.end = time.monotonic() + share()
        self.total = 0
        self.looked_at: int | None = None  # configs, where the ledger does not hold all of them (static tuning)
        self.pace = Pace()
        self._starts = run.starts(template, problem)
        self._took: list[float] = []  # seconds to compile a config

    def go(self) -> Row:
        first = [self.default, *self._starts]
        proposals = Proposals(
            self.template, self.problem, self.run.device, self.run.effort.trials,
            known=self.ledger.times(), first=first, seed=self.seed, sampler=self.run.effort.sampler,
        )  # fmt: skip
        self.total = proposals.total
        stored = self.ledger.winner()
        before = self.ledger.count()
        self.emit("start", f"{before} of {self.total} configs known" if before else "")
        if self.total > before:
            self.run.compile_first(self.problem)
        self.board = self.run.board(self.template, self.problem)
        if self.ledger.time(self.default) is None:
            compiled = self.run.compile(self.spec, self.default, True).result()
            self._record(self.default, self.run.judge.submit(self._judge, self.default, compiled, True).result())
            # Where nothing is known that won nearby, something has to be looked at, however long setting up took.
            self.end = min(time.monotonic() + self._share(0.0 if self._starts else _LEAST), self.run.end)
            self._took.append(compiled.seconds)
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
        proposals = Proposals(
            self.template, self.problem, self.run.device, self.run.effort.trials,
            known=self.ledger.times(), seed=self.seed ^ os.getpid(), sampler=self.run.effort.sampler,
        )  # fmt: skip
        self.total = proposals.total
        if self.total <= before or time.monotonic() >= self.end:
            return False
        self.board = self.run.board(self.template, self.problem)
        self.run.compile_first(self.problem)
        return self._explore(proposals, leading=False)

    def _explore(self, proposals: Proposals, *, leading: bool) -> bool:
        """Keep the compile pool and the GPU busy and record what they deliver, until the space or the time is over;
        who leads waits for what others work at. Returns whether anything was tried here."""
        self.pace.begin(self.ledger.count())
        most = self.run.pool.jobs + _WAITING
        compiling: dict[Future[Compiled], Config] = {}
        judging: dict[Future[Measured], Config] = {}
        tried = False
        while time.monotonic() < self.end:
            while len(compiling) + len(judging) < most and (config := self._ask(proposals)) is not None:
                if config == self.default:  # settled first of all
                    proposals.tell(config, self.ledger.time(config))
                elif self._claim(proposals, config):
                    compiling[self.run.compile(self.spec, config, False)] = config
                    tried = True
            if not compiling and not judging:
                if not (leading and self._others(proposals)):
                    return tried
                time.sleep(_POLL)
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
            time.sleep(_POLL)
        return tried

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
        if compiled.status != "ok":
            return failed(compiled.status, compiled.reason, protocol)
        best, bench = self.ledger.best_ms, self.run.bench
        hopeless = math.inf if best is None else _HOPELESS * best
        try:
            wrong = bench.verify(self.spec, config, cases)
            if wrong is not None:
                return failed("wrong", wrong, protocol)
            return timed(bench.measure(self.spec, config, self.run.effort.sample_seconds, hopeless), protocol)
        except WorkerError as error:
            return failed(error.status, str(error), protocol)

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
            for config, compiled in [(c, self.run.pool.submit(self.spec, c)) for c in best]:
                wrong = self._confirm(config, compiled.result())
                if wrong is None:
                    found.append(config)
                else:
                    self._record(config, wrong)
        return found

    def _confirm(self, config: Config, compiled: Compiled) -> Measured | None:
        """What is to be recorded of a config that was timed and does not hold, or None."""
        if compiled.status != "ok":
            return failed(compiled.status, compiled.reason, PROTOCOL)
        try:
            wrong = self.run.bench.verify(self.spec, config)
        except WorkerError as error:
            return failed(error.status, str(error), PROTOCOL)
        return None if wrong is None else failed("wrong", wrong, PROTOCOL)

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
