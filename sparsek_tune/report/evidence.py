"""What records say, in order: for each GPU its searches, one for each kernel and problem, with all their attempts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

from sparsek_tune.db.records import Record
from sparsek_tune.kernel_templates import FAMILIES, TEMPLATES
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem


class Kernel(NamedTuple):
    """One version of a kernel: its name, the hash of its source, that of its search space."""

    name: str
    source_hash: str
    space_version: str

    @property
    def template(self) -> Template | None:
        """This installation's template of that name, whatever its version."""
        return TEMPLATES.get(self.name)

    @property
    def current(self) -> bool:
        return self.template is not None and self.template.source_hash == self.source_hash


class Attempt(NamedTuple):
    """One measurement. ms: its median, None without one; low, high: its interval; race: whether it met the default in a
    race; run, at: the tuning command and the moment; stack: bytes a thread that the worst of its kernels spills."""

    config: Config
    status: str
    reason: str
    ms: float | None
    low: float | None
    high: float | None
    race: bool
    run: tuple[Any, ...]
    at: str
    stack: int = 0

    @property
    def timed(self) -> bool:
        return self.status == "ok"

    @property
    def failed(self) -> bool:
        return self.status not in ("ok", "static")


class Winner(NamedTuple):
    """The config that is served, and the times (ms) of the race that it won; None where nothing was timed."""

    config: Config
    static: bool
    default_ms: float | None
    tuned_ms: float | None

    @property
    def speedup(self) -> float | None:
        """Over the default."""
        return self.default_ms / self.tuned_ms if self.default_ms and self.tuned_ms else None


class Step(NamedTuple):
    """tried: how many configs there had been when the best time became ``ms``."""

    tried: int
    ms: float


@dataclass(eq=False)
class Search:
    """All attempts at one problem by one version of a kernel on one GPU, oldest first."""

    device: Device
    kernel: Kernel
    problem: Problem
    attempts: list[Attempt] = field(default_factory=list)
    winner: Winner | None = None

    @cached_property
    def trials(self) -> dict[Config, Attempt]:
        """The latest attempt at every config outside of races, in the order in which the configs were first tried."""
        return {a.config: a for a in self.attempts if not a.race}

    @cached_property
    def times(self) -> dict[Config, float]:
        """The median (ms) of every config that was timed, outside of races."""
        return {c: a.ms for c, a in self.trials.items() if a.timed and a.ms is not None}

    @cached_property
    def curve(self) -> list[Step]:
        """The best time so far, wherever it changes."""
        steps: list[Step] = []
        seen = set()
        for a in self.attempts:
            if a.race:
                continue
            seen.add(a.config)
            if a.timed and a.ms is not None and (not steps or a.ms < steps[-1].ms):
                steps.append(Step(len(seen), a.ms))
        return steps

    @cached_property
    def race(self) -> dict[Config, Attempt]:
        """What every contender of the last run that held a race got in it."""
        raced = [a for a in self.attempts if a.race and a.timed]
        return {a.config: a for a in raced if a.run == raced[-1].run}

    @cached_property
    def default(self) -> Config | None:
        """The default config, as this installation knows it. None for an unknown kernel or an impossible problem."""
        return default(self.kernel.template, self.problem, self.device)


def default(template: Template | None, problem: Problem, device: Device) -> Config | None:
    if template is None:
        return None
    try:
        return template.default(problem, device)
    except Exception:  # a record's problem may be anything, and a template expects one that can be run
        return None


@dataclass(eq=False)
class Gpu:
    """A GPU with its software: another driver or Triton is another one."""

    device: Device
    searches: list[Search] = field(default_factory=list)

    @property
    def attempts(self) -> Iterator[Attempt]:
        return (a for s in self.searches for a in s.attempts)

    @cached_property
    def by_kernel(self) -> dict[Kernel, list[Search]]:
        found: dict[Kernel, list[Search]] = {}
        for search in self.searches:
            found.setdefault(search.kernel, []).append(search)
        return found


_FIELDS = {kind: get_type_hints(kind) for kind in (Device, Kernel, Problem)}


def gpus(records: Iterable[Record]) -> list[Gpu]:
    """The GPUs of records, in the order of their first measurements; searches by kernel, as they run, and problem.

    Raises ValueError, TypeError or KeyError for a record that holds what it should not.
    """
    searches: dict[tuple[Device, Kernel, Problem], Search] = {}
    for record in sorted(records, key=lambda r: r["created_at"]):
        key = (_made(Device, record["device"]), _made(Kernel, record["template"]), _made(Problem, record["problem"]))
        search = searches.setdefault(key, Search(*key))
        attempt = _attempt(record)
        search.attempts.append(attempt)
        if record["winner"] is not None:
            default_ms, tuned_ms = (_time(record["winner"][name]) for name in ("default_ms", "tuned_ms"))
            search.winner = Winner(attempt.config, attempt.status == "static", default_ms, tuned_ms)
    found: dict[Device, Gpu] = {}
    for search in searches.values():
        found.setdefault(search.device, Gpu(search.device)).searches.append(search)
    for gpu in found.values():
        gpu.searches.sort(key=_place)
    return list(found.values())


def _place(search: Search) -> tuple[Any, ...]:
    kernel = search.kernel
    family = FAMILIES.index(kernel.name) if kernel.name in FAMILIES else len(FAMILIES)
    return (family, kernel.name, not kernel.current, kernel, search.problem)


def _attempt(record: Record) -> Attempt:
    run = tuple(record["run"][name] for name in ("command", "host", "pid", "started_at"))
    ms, low, high = (_time(record[name]) for name in ("median_ms", "ci_low_ms", "ci_high_ms"))
    race = record["protocol"].get("phase") == "race"
    config = Config(record["config"])
    stack = _stack(record["protocol"].get("kernels"))
    return Attempt(config, record["status"], record["reason"], ms, low, high, race, run, record["created_at"], stack)


def _stack(kernels: Any) -> int:
    """A protocol may hold anything; what is not as the tuner writes it says nothing."""
    kernels = kernels if isinstance(kernels, list) else []
    stacks = (k.get("stack") for k in kernels if isinstance(k, dict))
    return max((s for s in stacks if isinstance(s, int)), default=0)


def _made(kind: Any, fields: Mapping[str, Any]) -> Any:
    """A ``kind`` of fields. SQLite keeps any type in any column: what is of another than wanted is refused."""
    for name, wanted in _FIELDS[kind].items():
        if not isinstance(fields[name], wanted):
            raise ValueError(f"{name} must be of type {wanted.__name__}, but is {fields[name]!r}")
    return kind(**fields)


def _time(x: Any) -> float | None:
    if x is not None and not (isinstance(x, int | float) and math.isfinite(x) and x > 0):
        raise ValueError(f"a time must be finite and above 0, but is {x!r}")
    return x
