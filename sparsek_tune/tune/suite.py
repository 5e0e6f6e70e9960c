"""A suite: the problems of one run, a waiting trial each, which processes on equal GPUs take one by one.

Each kernel (a template at a projected problem) belongs to one problem of its suite. While a process drives a problem,
the trial names the search that it is at; who finds no problem to take helps there. The problem's rows end the trial.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune import studies
from sparsek_tune.tune.studies import Studies
from sparsek_tune.tune.types import Row, row_of

_TRIES = 3  # processes that may die at one problem

Task = tuple[Problem, tuple[str, ...]]  # a problem and the names of the kernels that belong to it


class Searching(NamedTuple):
    """A search under way. until: Unix time; companions: what stands beside it, as in its ``Spec``."""

    template: str
    problem: Problem
    until: float
    companions: Mapping[str, Config]


def _searching(problem: Mapping[str, Any], companions: Mapping[str, str], **fields: Any) -> Searching:
    """From its JSON form."""
    beside = {name: Config.from_key(key) for name, key in companions.items()}
    return Searching(problem=Problem(**problem), companions=beside, **fields)


def tasks(problems: Sequence[Problem], templates: Sequence[Template]) -> list[Task]:
    """Every kernel once, with the first problem that needs it."""
    seen: set[tuple[str, Problem]] = set()
    found: list[Task] = []
    for problem in problems:
        new = {t.name: (t.name, problem.project(t.fields)) for t in templates}
        names = tuple(name for name, key in new.items() if key not in seen)
        seen.update(new.values())
        if names:
            found.append((problem, names))
    return found


def again(study: optuna.Study, trial: FrozenTrial) -> None:
    """For Studies: a problem whose process died waits once more."""
    about = trial.user_attrs
    if "problem" in about and about["tries"] < _TRIES and not study.user_attrs.get("withdrawn"):
        attributes = {"problem": about["problem"], "kernels": about["kernels"], "tries": about["tries"] + 1}
        study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=attributes))


def _prefix(device: Device, templates: Mapping[str, Template]) -> str:
    sources = repr([(t.name, t.source_hash, [(p.name, p.domain.values) for p in t.space]) for t in templates.values()])
    return f"suite on {studies.fingerprint(device)}, sources {sha256(sources.encode()).hexdigest()[:12]}: "


class Suite:
    """Methods raise StudiesError."""

    def __init__(self, shared: Studies, name: str) -> None:
        self.name, self._studies, self._study = name, shared, shared.study(name)
        self.about: dict[str, Any] = shared.attributes(self._study)["suite"]  # effort, seed, until (Unix time)
        self._buried = time.monotonic()

    @classmethod
    def create(
        cls, shared: Studies, device: Device, templates: Mapping[str, Template], work: Sequence[Task],
        about: Mapping[str, Any],
    ) -> Suite:  # fmt: skip
        name = f"{_prefix(device, templates)}{socket.gethostname()} {os.getpid()} {time.time():.3f}"
        study = shared.study(name, {"suite": dict(about)})
        for problem, names in work:
            shared.add(study, {"problem": problem._asdict(), "kernels": names, "tries": 1})
        return cls(shared, name)

    def sister(self, device: Device, other: Device) -> Suite:
        """The same work for another device than this suite's, ``device``."""
        name = self.name.replace(studies.fingerprint(device), studies.fingerprint(other), 1)
        study = self._studies.study(name, {"suite": self.about})
        for trial in self._studies.trials(self._study):
            about = {**{key: trial.user_attrs[key] for key in ("problem", "kernels")}, "tries": 1}
            self._studies.add(study, about)
        return Suite(self._studies, name)

    @classmethod
    def joinable(cls, shared: Studies, device: Device, templates: Mapping[str, Template]) -> list[Suite]:
        """The suites of this device and these sources that have work left, oldest first."""
        prefix = _prefix(device, templates)
        # A run withdraws its suite at its end: of all that a file has seen, few are looked into.
        names = [
            name for name, about in shared.all().items()
            if name.startswith(prefix) and "suite" in about and not about.get("withdrawn")
        ]  # fmt: skip
        return [suite for suite in (cls(shared, name) for name in names) if not suite.over()]

    def take(self) -> tuple[int, Task] | None:
        """A problem to drive, with the number of its claim."""
        for trial in self._studies.trials(self._study, TrialState.WAITING):
            if self._studies.take(self._study, trial._trial_id):
                problem = Problem(**trial.user_attrs["problem"])
                return trial._trial_id, (problem, tuple(trial.user_attrs["kernels"]))
        return None

    def ahead(self) -> tuple[int, int]:
        """Kernels that wait, and problems that are driven."""
        waiting = self._studies.trials(self._study, TrialState.WAITING)
        driven = self._studies.trials(self._study, TrialState.RUNNING)
        return sum(len(t.user_attrs["kernels"]) for t in waiting), max(1, len(driven))

    def searching(self, claim: int, search: Searching) -> None:
        companions = {name: config.key for name, config in search.companions.items()}
        self._studies.note(
            claim, "searching", {**search._asdict(), "problem": search.problem._asdict(), "companions": companions}
        )

    def searches(self) -> list[Searching]:
        """What others are at."""
        self.bury()
        found = [t.user_attrs["searching"] for t in self._studies.trials(self._study, TrialState.RUNNING)
                 if "searching" in t.user_attrs]  # fmt: skip
        return [_searching(**fields) for fields in found]

    def finish(self, claim: int, rows: Sequence[Row]) -> None:
        """The problem is done. What the trial is worth: the part of the default's time that is left."""
        self._studies.note(claim, "rows", [{**row._asdict(), "problem": row.problem._asdict()} for row in rows])
        ratios = [1 / row.speedup for row in rows if row.speedup]
        self._studies.finish(claim, sum(ratios) / len(ratios) if ratios else 1.0)

    def give_back(self, claim: int) -> None:
        self._studies.give_back(self._study, claim)

    def rows(self) -> list[Row]:
        """Of the problems that are done, in no order."""
        trials = self._studies.trials(self._study, TrialState.COMPLETE)
        return [row_of(fields) for trial in trials for fields in trial.user_attrs.get("rows", ())]

    def over(self) -> bool:
        """Whether nothing is left that waits or is under way."""
        self.bury()
        return not self._studies.trials(self._study, TrialState.WAITING, TrialState.RUNNING)

    def withdraw(self) -> None:
        """Nobody begins another problem of this suite."""
        self._studies.set(self._study, "withdrawn", True)
        for trial in self._studies.trials(self._study, TrialState.WAITING):
            self._studies.finish(trial._trial_id, None)

    def bury(self) -> None:
        if time.monotonic() > self._buried + studies.GRACE / 4:
            self._studies.bury(self._study)
            self._buried = time.monotonic()
