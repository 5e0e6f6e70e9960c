"""The run: a search for every problem and template, and what all of them share: processes, time, winners so far."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sparsek_tune import dispatch
from sparsek_tune.db import reader
from sparsek_tune.db.reader import Entry
from sparsek_tune.db.store import Store
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem, target_device
from sparsek_tune.tune import forkserver, static
from sparsek_tune.tune.bench import Bench
from sparsek_tune.tune.board import Board
from sparsek_tune.tune.pace import Outlook, Shares
from sparsek_tune.tune.pool import CompilePool
from sparsek_tune.tune.record import Ledger
from sparsek_tune.tune.search import POLL, Search, Won
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.studies import Studies, StudiesError, path_beside
from sparsek_tune.tune.suite import Searching, Suite, Task, again, tasks
from sparsek_tune.tune.types import EFFORTS, Event, OnEvent, Row, Spec


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
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget must be above 0 seconds and finite, but is {budget}")
    device = target_device(target) if target is not None else device
    if device is None:
        raise ValueError("device must be given where target is None, but is None")
    if unknown := sorted(set(kernels or ()) - templates.keys()):
        raise ValueError(f"kernels must be of {', '.join(templates)}, but names {', '.join(unknown)}")
    work = tasks(list(problems), [t for t in templates.values() if not kernels or t.name in kernels])
    about = {"effort": effort, "seed": seed, "until": None if budget is None else time.time() + budget}
    with ExitStack() as stack, _begun(device, store, templates, about, on_event, factory, jobs) as run:
        if work:
            run.expect(*work[0])  # to make new studies takes a second
        try:
            run.studies = stack.enter_context(closing(Studies.of(store.where, again)))
        except StudiesError as error:
            run.note(f"{error}; this process works by itself")
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
    if not wait and isinstance(store.where, Path) and not path_beside(store.where).exists():
        return 0  # no run has been here, and no file is left behind for it
    with closing(Studies.of(store.where, again)) as shared:
        while True:
            found = [Suite(shared, suite)] if suite else Suite.joinable(shared, device, templates)
            for one in found:
                with _begun(device, store, templates, one.about, on_event, factory, jobs) as run:
                    run.studies = shared
                    run.work(one)
                last, done = time.monotonic(), done + 1
            if suite or (not found and time.monotonic() >= last + wait):
                return done
            if not found:
                time.sleep(min(POLL, max(0.0, last + wait - time.monotonic())))


@contextmanager
def _begun(
    device: Device, store: Store, templates: Mapping[str, Template], about: Mapping[str, Any], on_event: OnEvent | None,
    factory: str, jobs: int | None,
) -> Iterator[Run]:  # fmt: skip
    """A run, noted in the store with its end."""
    number = store.start_run(" ".join(sys.argv))
    outcome = "failed"
    try:
        with Run(device, store, number, templates, about, on_event, factory, jobs) as run:
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
    ) -> None:
        effort, until = EFFORTS[about["effort"]], about["until"]
        self.device, self.templates, self.effort, self.seed = device, templates, effort, about["seed"]
        self._store, self._run, self._on_event = store, run, on_event
        self.studies: Studies | None = None  # shared with other processes
        self._emitting = threading.Lock()
        self._rows: dict[tuple[str, Problem], Row] = {}
        self.end = math.inf if until is None else time.monotonic() + until - time.time()
        self._outlook = Outlook(effort.seconds / len(templates), self.end)
        self._ahead: Sequence[Search] = ()  # to be tuned at the same problem, after the current one
        self._raced: list[Search] = []  # whose winners are not settled yet
        self._server = forkserver.take(factory)
        self.pool = CompilePool(factory, jobs, effort.timeout, self._server)
        mode, patience = ("interpret", static.PATIENCE) if device.static else ("measure", 1)
        self.bench = Bench(factory, mode, patience * effort.timeout, self._server)
        # One thread, for one measuring process: the GPU works on while results are recorded and configs proposed.
        self.judge = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self.verified: dict[tuple[str, Config, Problem], tuple[str, str]] = {}  # of static tuning

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # each, whatever happens to the others; the last first
            stack.callback(self._server.close)
            stack.callback(self.judge.shutdown)
            stack.callback(self.pool.close)
            stack.callback(self.bench.close)
            if not self._server.ready:  # what waits for it does not wait on
                stack.callback(self._server.close)
            stack.callback(self.judge.shutdown, wait=False, cancel_futures=True)

    def tune(
        self, work: list[Task], about: Mapping[str, Any],
        crew: Callable[[Suite, OnEvent], AbstractContextManager[Any]] | None,
    ) -> list[Row]:  # fmt: skip
        """Tune every kernel of ``work``, together with whoever joins; the rows in its order."""
        keys = [(name, problem.project(self.templates[name].fields)) for problem, names in work for name in names]
        self._outlook.kernels = len(keys)
        try:
            if self.studies is not None:
                suite = Suite.create(self.studies, self.device, self.templates, work, {**about, "kernels": len(keys)})
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
            self.studies = None
        for at, (problem, names) in enumerate(work):
            left = [n for n in names if (n, problem.project(self.templates[n].fields)) not in self._rows]
            if left:
                ahead = sum(len(names) for _, names in work[at + 1 :])
                self._drive(problem, left, ahead, lambda search: None)
        if missing := [key for key in keys if key not in self._rows]:
            self.emit(Event("note", *missing[0], 0, 0, None, f"the budget is spent: {len(missing)} kernels not tuned"))
        return [self._rows[key] for key in keys if key in self._rows]

    def expect(self, problem: Problem, names: Iterable[str]) -> None:
        """Begin to compile what the searches at ``problem`` begin with: those defaults that have no time yet."""
        if self.device.static:
            return
        won = self.won(problem)
        for template in self._in_order(names):
            search = Search(self, template, problem, lambda least=0.0: least)
            if search.ledger.time(search.default) is None:
                search.compile_default(search.beside(won), early=True)

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
                time.sleep(POLL)

    def _drive(
        self, problem: Problem, names: Iterable[str], ahead: int, tell: Callable[[Searching], None]
    ) -> list[Row]:
        """Tune kernels of one problem, in tuning order; ahead: how many more this process has to expect."""
        templates = self._in_order(names)
        limit = math.inf if self.device.static else self.effort.seconds  # static tuning looks at few configs anyway
        later = problem._replace(n=0)
        shares = Shares(limit, self.end, [*[problem] * len(templates), *[later] * ahead])
        self._raced.clear()
        searches = [Search(self, t, problem, partial(shares.of, problem), tell) for t in templates]
        for at, search in enumerate(searches):
            if time.monotonic() >= self.end:
                searches = searches[:at]
                break
            self._ahead = searches[at + 1 :]
            if self.device.static:
                static.search(search)
            else:
                search.go()
                self._raced.append(search)
                self.settle()
            shares.done(problem)
        self._ahead = ()
        self.settle(wait=True)
        return [search.settle() for search in searches]

    def settle(self, *, wait: bool = False) -> None:
        """The last word on what has raced, as far as it is compiled. The measuring process has to be idle."""
        for search in self._raced:
            if wait:
                search.settle()
            elif not search.settled and search.ready:
                search.confirm()
        self._raced = [search for search in self._raced if not search.settled]

    def _help(self, what: Searching) -> bool:
        """Take part in a search that another process drives; whether there was anything to do."""
        if self.device.static:  # nothing is measured, and compiling is shared by problems alone
            return False
        seconds = max(0.0, min(what.until - time.time(), self.end - time.monotonic()))
        search = Search(self, self.templates[what.template], what.problem, lambda least=0.0: seconds)
        return search.help(what.companions)

    def _in_order(self, names: Iterable[str]) -> list[Template]:
        """Templates in tuning order."""
        wanted = set(names)
        return [t for t in self.templates.values() if t.name in wanted]

    def board(self, template: Template, problem: Problem) -> Board:
        return Board(self.studies, self.device, template, problem, self.note)

    def foresee(
        self, problem: Problem, template: Template | None = None, best: Config | None = None, *, early: bool = False
    ) -> None:
        """Have compiled what the searches to come at ``problem`` begin with, in their order, if it is the ``best``
        config of ``template`` that stands beside them. early: see ``CompilePool.submit``."""
        won = self.won(problem)
        if template is not None and best is not None:
            won[template.name] = Won([best], [])
        specs = [search.beside(won) for search in self._ahead]
        for search, spec in zip(self._ahead, specs, strict=True):
            search.compile_default(spec, early=early)
        for search, spec in zip(self._ahead, specs, strict=True):
            search.compile_opening(spec)

    def spec(self, template: Template, problem: Problem, won: Mapping[str, Won]) -> Spec:
        """With what is served of the other templates as companions; of ``template`` itself the default."""
        defaults = {t.name: t.default(problem, self.device) for t in self.templates.values()}
        served = {name: w.served[0] for name, w in won.items() if w.served and name != template.name}
        return Spec(template.name, problem, self.device, defaults | served)

    def won(self, problem: Problem) -> dict[str, Won]:
        """Of every template, here and as shipped."""
        stored = [*self._store.winners(), *self._shipped]
        won = {t.name: self._won(t, problem, stored) for t in self.templates.values()}
        return won | {s.template.name: Won([s.likely], []) for s in self._raced if s.problem == problem}

    def _won(self, template: Template, problem: Problem, stored: Sequence[Entry]) -> Won:
        like = [
            c for c in dispatch.candidates(template, problem, self.device, stored)
            # A GPU's kernels do not run beside what no GPU has run.
            if (self.device.static or not c.entry.static)
            and not dispatch.foreign(c.entry, template, problem, self.device)
            and not dispatch.unusable(c.entry, template, problem, self.device)
        ]  # fmt: skip
        served = list(dict.fromkeys(Config.from_key(c.entry.config) for c in like if not c.refused))
        far = dict.fromkeys(Config.from_key(c.entry.config) for c in like if c.refused)
        return Won(served, [config for config in far if config not in served])

    @cached_property
    def _shipped(self) -> tuple[Entry, ...]:
        return reader.load_shipped(self.device.kind, self.device.cc).entries

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
