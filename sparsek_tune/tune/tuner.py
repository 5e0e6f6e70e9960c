"""The run: for every problem and template propose, compile, verify, measure, record; then race and choose."""

from __future__ import annotations

import math
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack

from sparsek_tune.db.store import Store
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem, target_device
from sparsek_tune.tune import static
from sparsek_tune.tune.bench import Bench
from sparsek_tune.tune.channel import WorkerError
from sparsek_tune.tune.compile import Compiled, CompilePool
from sparsek_tune.tune.measure import PROTOCOL, Estimate, choose
from sparsek_tune.tune.pace import Outlook, Pace
from sparsek_tune.tune.propose import Proposals
from sparsek_tune.tune.record import FAILED, INFEASIBLE, WRONG, Ledger
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.types import EFFORTS, Effort, Event, OnEvent, Row, Spec, Trial

_HOPELESS = 1.5  # a candidate whose whole interval lies above this multiple of the best is not sampled further
_STARTS = 3  # winners of other problems that a search begins with


def tune(
    problems: Iterable[Problem],
    device: Device | None,
    store: Store,
    *,
    effort: str = "default",
    budget: float | None = None,
    on_event: OnEvent | None = None,
    target: str | None = None,
    seed: int = 0,
    templates: Mapping[str, Template] = TEMPLATES,
    factory: str = FACTORY,
) -> list[Row]:
    """See :func:`sparsek_tune.tune.tune`. templates, factory: what is tuned and how a worker sets it up, for tests."""
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, but is {effort!r}")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be above 0 seconds, but is {budget}")
    device = target_device(target) if target is not None else device
    if device is None:
        raise ValueError("device must be given where target is None, but is None")
    run = store.start_run(" ".join(sys.argv))
    outcome = "failed"
    try:
        with Run(device, store, run, templates, EFFORTS[effort], budget, on_event, seed, factory) as state:
            rows = state.tune(list(problems))
        outcome = "done"
        return rows
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        store.finish_run(run, outcome)


class Run:
    """One tuning run: the processes it keeps, the time it has, the winners so far."""

    def __init__(
        self,
        device: Device,
        store: Store,
        run: int,
        templates: Mapping[str, Template],
        effort: Effort,
        budget: float | None,
        on_event: OnEvent | None,
        seed: int,
        factory: str,
    ) -> None:
        self.device, self.templates, self.effort, self.seed = device, templates, effort, seed
        self._store, self._run, self._on_event = store, run, on_event
        self.end = math.inf if budget is None else time.monotonic() + budget
        self._outlook = Outlook(effort.seconds, self.end)
        self._best: dict[tuple[str, Problem], Config] = {}
        self._compiled: set[Problem] = set()
        self.pool = CompilePool(factory, timeout=effort.timeout)
        self.bench = Bench(factory, "interpret" if device.static else "measure", effort.timeout)
        self.verified: dict[tuple[str, Config, Problem], tuple[str, str]] = {}  # of static tuning

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # each, whatever happens to the other
            stack.callback(self.pool.close)
            stack.callback(self.bench.close)

    def tune(self, problems: list[Problem]) -> list[Row]:
        """Tune every distinct (template, projected problem), problem by problem in tuning order."""
        tasks: dict[tuple[str, Problem], tuple[Template, Problem]] = {}
        for problem in problems:
            for template in self.templates.values():
                tasks.setdefault((template.name, problem.project(template.fields)), (template, problem))
        self._outlook.kernels = len(tasks)
        rows = []
        for done, (template, problem) in enumerate(tasks.values()):
            left = self.end - time.monotonic()
            if left <= 0:
                self._say(template, problem, "note", f"the budget is spent: {len(tasks) - done} kernels not tuned")
                break
            search = Search(self, template, problem, min(self.effort.seconds, left / (len(tasks) - done)))
            row = static.search(search) if self.device.static else search.go()
            if row.config is not None:
                self._best[template.name, row.problem] = row.config
            rows.append(row)
        return rows

    def compile_defaults(self, problem: Problem) -> None:
        """Compile every default at once: the measuring process, which needs all of them, then only loads them."""
        if problem in self._compiled:
            return
        self._compiled.add(problem)
        jobs = []
        for t in self.templates.values():
            spec = Spec(t.name, problem, self.device, self.companions(t, problem))
            jobs.append(self.pool.submit(spec, t.default(problem, self.device)))
        wait(jobs)

    def companions(self, template: Template, problem: Problem) -> dict[str, Config]:
        """The winners so far and the defaults elsewhere; for ``template`` itself the default."""
        found = {t.name: t.default(problem, self.device) for t in self.templates.values()}
        for t in self.templates.values():
            if t.name != template.name and (best := self._best.get((t.name, problem.project(t.fields)))) is not None:
                found[t.name] = best
        return found

    def starts(self, template: Template) -> list[Config]:
        """Winners of ``template`` at the problems before, latest first."""
        return [c for (name, _), c in reversed(self._best.items()) if name == template.name][:_STARTS]

    def ledger(self, template: Template, problem: Problem) -> Ledger:
        return Ledger(self._store, self.device, template, problem, self._run)

    def _say(self, template: Template, problem: Problem, kind: str, message: str) -> None:
        self.emit(Event(kind, template.name, problem.project(template.fields), 0, 0, None, message))

    def emit(self, event: Event) -> None:
        event = self._outlook.see(event)
        if self._on_event is not None:
            self._on_event(event)


class Search:
    """The search for one template at one problem, ``seconds`` long at most (wall time)."""

    def __init__(self, run: Run, template: Template, problem: Problem, seconds: float) -> None:
        self.run, self.template, self.problem = run, template, problem
        self.key = problem.project(template.fields)
        self.ledger = run.ledger(template, problem)
        self.default = template.default(problem, run.device)
        self.spec = Spec(template.name, problem, run.device, run.companions(template, problem))
        self.seed = zlib.crc32(f"{run.seed} {template.name} {self.key}".encode())
        self._seconds = seconds
        self.end = time.monotonic() + seconds
        self.total = 0
        self.looked_at: int | None = None  # configs, where the ledger does not hold all of them (static tuning)
        self.pace = Pace()

    def go(self) -> Row:
        proposals = Proposals(
            self.template, self.problem, self.run.device, self.run.effort.trials,
            known=self.ledger.times(), first=[self.default, *self.run.starts(self.template)], seed=self.seed,
        )  # fmt: skip
        self.total = proposals.total
        stored = self.ledger.winner()
        before = self.ledger.count()
        self.emit("start", f"{before} of {self.total} configs known" if before else "")
        if self.ledger.times().get(self.default) is None:
            self.run.compile_defaults(self.problem)
            self._settle(self.default, self.run.pool.submit(self.spec, self.default).result())
            # What it takes to set everything up is no part of the search, but for the end of the whole run.
            self.end = min(time.monotonic() + self._seconds, self.run.end)
        if self.ledger.times()[self.default] is None:
            return self.row(None, None, None, f"the default config does not work: {self._why(self.default)}")
        self._explore(proposals)
        if stored is not None and self.ledger.count() == before and not self.ledger.unraced():  # the old race stands
            return self.row(Config.from_key(stored.config), stored.default_ms, stored.tuned_ms, "as stored")
        return self._race()

    def _explore(self, proposals: Proposals) -> None:
        """Keep the compile pool busy and settle what it delivers, in its order, until the space or the time is over."""
        self.pace.begin(self.ledger.count())
        pending: dict[Future[Compiled], Config] = {}
        while time.monotonic() < self.end:
            while len(pending) < 2 * self.run.pool.jobs and (config := proposals.ask()) is not None:
                if config == self.default:  # settled first of all
                    proposals.tell(config, self.ledger.times()[config])
                    continue
                pending[self.run.pool.submit(self.spec, config)] = config
            if not pending:
                return
            done, _ = wait(pending, timeout=max(0.0, self.end - time.monotonic()), return_when=FIRST_COMPLETED)
            for future in [f for f in pending if f in done][:1]:
                config = pending.pop(future)
                proposals.tell(config, self._settle(config, future.result()))
        for future in pending:
            future.cancel()

    def _settle(self, config: Config, compiled: Compiled) -> float | None:
        """Verify, time and record one compiled candidate; its median (ms), or None."""
        protocol = {**PROTOCOL, "kernels": [k._asdict() for k in compiled.kernels]}
        if compiled.status != "ok":
            self.ledger.fail(config, compiled.status, compiled.reason, protocol)
        else:
            best = self.ledger.ranking()[:1]
            hopeless = _HOPELESS * self.ledger.times()[best[0]] if best else math.inf  # type: ignore[operator]
            bench, seconds = self.run.bench, self.run.effort.sample_seconds
            try:
                wrong = bench.verify(self.spec, config)
                if wrong is not None:
                    self.ledger.fail(config, "wrong", wrong, protocol)
                else:
                    self.ledger.ok(config, bench.measure(self.spec, config, seconds, hopeless), protocol)
            except WorkerError as error:
                self.ledger.fail(config, error.status, str(error), protocol)
        median = self.ledger.times()[config]
        self.emit("trial", self._why(config), trial=Trial(config, self.ledger.latest[config].status, median))
        return median

    def _race(self) -> Row:
        """The default against the fastest others; only one that beats it there replaces it."""
        finalists = [c for c in self.ledger.ranking() if c != self.default][: self.run.effort.finalists]
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
            self.ledger.ok(config, result, {**PROTOCOL, "phase": "race", "contenders": len(everyone)})
        return results

    def _race_once(self, configs: list[Config]) -> list[Estimate]:
        return self.run.bench.race(self.spec, configs, self.run.effort.race_seconds, self.seed)

    def _fail(self, config: Config, error: WorkerError) -> None:
        self.ledger.fail(config, error.status, f"in the race: {error}", PROTOCOL)

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
        times = self.ledger.times()
        best = min((ms for ms in times.values() if ms is not None), default=None)
        done = self.ledger.count() if self.looked_at is None else self.looked_at
        total = max(self.total, done)
        rate = self.pace.rate(done) if kind == "trial" else None
        self.run.emit(Event(
            kind, self.template.name, self.key, done, total, best, message, times.get(self.default), rate,
            self._left(kind, done, total), trial, row,
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
