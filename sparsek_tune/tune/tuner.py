"""The run: for every problem and template propose, compile, verify, measure, record; then race and choose."""

from __future__ import annotations

import math
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial

from sparsek_tune import dispatch
from sparsek_tune.db import reader
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem, target_device
from sparsek_tune.tune import static
from sparsek_tune.tune.bench import Bench
from sparsek_tune.tune.channel import WorkerError
from sparsek_tune.tune.compile import Compiled, CompilePool
from sparsek_tune.tune.measure import PROTOCOL, Estimate, choose
from sparsek_tune.tune.pace import Outlook, Pace, Shares
from sparsek_tune.tune.propose import Proposals
from sparsek_tune.tune.record import FAILED, INFEASIBLE, WRONG, Ledger, failed, timed
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.types import EFFORTS, Effort, Event, OnEvent, Row, Spec, Trial

_HOPELESS = 1.5  # a candidate whose whole interval lies above this multiple of the best is not sampled further
_LEAST = 5.0  # seconds for the search of a kernel of which no winner is known nearby
_WAITING = 2  # candidates that wait for a free compiler: more would be proposed without the results of those before
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
    if unknown := sorted(set(kernels or ()) - templates.keys()):
        raise ValueError(f"kernels must be of {', '.join(templates)}, but names {', '.join(unknown)}")
    run = store.start_run(" ".join(sys.argv))
    outcome = "failed"
    try:
        with Run(device, store, run, templates, EFFORTS[effort], budget, on_event, seed, factory) as state:
            rows = state.tune(list(problems), [t for t in templates.values() if not kernels or t.name in kernels])
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
        self._outlook = Outlook(effort.seconds / len(templates), self.end)
        self._ahead: defaultdict[Problem, list[tuple[Spec, Config, Future[Compiled]]]] = defaultdict(list)
        self.pool = CompilePool(factory, timeout=effort.timeout)
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

    def tune(self, problems: list[Problem], templates: list[Template]) -> list[Row]:
        """Tune every distinct (template, projected problem), problem by problem in tuning order."""
        tasks: dict[tuple[str, Problem], tuple[Template, Problem]] = {}
        for problem in problems:
            for template in templates:
                tasks.setdefault((template.name, problem.project(template.fields)), (template, problem))
        self._outlook.kernels = len(tasks)
        rows = []
        limit = math.inf if self.device.static else self.effort.seconds  # static tuning looks at few configs anyway
        shares = Shares(limit, self.end, [problem for _, problem in tasks.values()])
        for done, (template, problem) in enumerate(tasks.values()):
            if time.monotonic() >= self.end:
                self._say(template, problem, "note", f"the budget is spent: {len(tasks) - done} kernels not tuned")
                break
            search = Search(self, template, problem, partial(shares.of, problem))
            rows.append(static.search(search) if self.device.static else search.go())
            shares.done(problem)
        return rows

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

    def _say(self, template: Template, problem: Problem, kind: str, message: str) -> None:
        self.emit(Event(kind, template.name, problem.project(template.fields), 0, 0, None, message))

    def emit(self, event: Event) -> None:
        event = self._outlook.see(event)
        if self._on_event is not None:
            self._on_event(event)


class Search:
    """The search for one template at one problem. share: as ``Shares.of`` its problem."""

    def __init__(self, run: Run, template: Template, problem: Problem, share: Callable[..., float]) -> None:
        self.run, self.template, self.problem = run, template, problem
        self.key = problem.project(template.fields)
        self.ledger = run.ledger(template, problem)
        self.default = template.default(problem, run.device)
        self.spec = Spec(template.name, problem, run.device, run.companions(template, problem))
        self.seed = zlib.crc32(f"{run.seed} {template.name} {self.key}".encode())
        self._share = share
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
        if self.ledger.time(self.default) is None:
            compiled = self.run.compile(self.spec, self.default, True).result()
            self._record(self.default, self.run.judge.submit(self._judge, self.default, compiled, True).result())
            # Where nothing is known that won nearby, something has to be looked at, however long setting up took.
            self.end = min(time.monotonic() + self._share(0.0 if self._starts else _LEAST), self.run.end)
            self._took.append(compiled.seconds)
        if self.ledger.time(self.default) is None:
            return self.row(None, None, None, f"the default config does not work: {self._why(self.default)}")
        self._explore(proposals)
        if stored is not None and self.ledger.count() == before and not self.ledger.unraced():  # the old race stands
            return self.row(Config.from_key(stored.config), stored.default_ms, stored.tuned_ms, "as stored")
        return self._race()

    def _explore(self, proposals: Proposals) -> None:
        """Keep the compile pool and the GPU busy and record what they deliver, until the space or the time is over."""
        self.pace.begin(self.ledger.count())
        most = self.run.pool.jobs + _WAITING
        compiling: dict[Future[Compiled], Config] = {}
        judging: dict[Future[Measured], Config] = {}
        while time.monotonic() < self.end:
            while len(compiling) + len(judging) < most and (config := self._ask(proposals)) is not None:
                if config == self.default:  # settled first of all
                    proposals.tell(config, self.ledger.time(config))
                    continue
                compiling[self.run.compile(self.spec, config, False)] = config
            if not compiling and not judging:
                return
            left = max(0.0, self.end - time.monotonic())
            for future in wait([*judging, *compiling], timeout=left, return_when=FIRST_COMPLETED).done:
                if future in compiling:
                    config, compiled = compiling.pop(future), future.result()
                    self._took.append(compiled.seconds)
                    judging[self.run.judge.submit(self._judge, config, compiled, False)] = config
                else:
                    config = judging.pop(future)
                    proposals.tell(config, self._record(config, future.result()))
        cancelled = {future for future in (*compiling, *judging) if future.cancel()}
        for future in judging.keys() - cancelled:  # has begun: what it costs is spent
            self._record(judging[future], future.result())

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
