"""One search by several processes: each config is claimed, in a study of its own, before anybody works at it."""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from sparsek_tune.kernel_templates.base import Config, Pow2, Template
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune import studies
from sparsek_tune.tune.studies import Studies, StudiesError


def name_of(device: Device, template: Template, problem: Problem) -> str:
    """The study's name says all that must not be mixed."""
    key = problem.project(template.fields)
    space = repr([(p.name, p.domain.values) for p in template.space])
    sources = sha256(f"{template.source_hash} {space}".encode()).hexdigest()[:12]
    return f"{template.name} [{key}] on {studies.fingerprint(device)}, sources {sources}"


class Board:
    """The claims of one search. Where the studies fail, it says so once by ``note`` and grants everything.

    shared: None: there are no studies.
    """

    def __init__(
        self, shared: Studies | None, device: Device, template: Template, problem: Problem, note: Callable[[str], None]
    ) -> None:
        self._studies, self._template, self._note = shared, template, note
        self._mine: dict[Config, int] = {}
        self._others: dict[Config, int] = {}
        self._waiting: dict[int, float] = {}  # claims of others in the making, and when they were first seen
        self._last: int | None = None
        self._buried = time.monotonic()
        try:
            name = name_of(device, template, problem)
            self._study = shared.study(name, {"template": template.name}) if shared is not None else 0
        except StudiesError as error:
            self._alone(error)

    def claim(self, config: Config) -> bool:
        """Whether this process may work at ``config``: nobody else does. Look at the store once more after it, unless
        :attr:`quiet`."""
        if self._studies is None:
            return True
        try:
            values, space = _parameters(self._template, config)
            trial = self._studies.add(self._study, {"claim": {"config": config.key}}, values, space)
            if not self._studies.take(self._study, trial):  # it took so long that others gave it up
                return False
            # Numbers in a row: nobody else claimed anything in between.
            self.quiet = self._last is not None and trial == self._last + 1 and not self._others
            self._last = trial
            self._mine[config] = trial
            if not self.quiet and self._look().get(config, trial) < trial:  # of two, the later one gives way
                self.drop(config)
                return False
        except StudiesError as error:
            self._alone(error)
        return True

    quiet = True

    def settle(self, config: Config, status: str, ms: float | None) -> None:
        """What came of a claimed config; it is in the store already."""
        trial = self._mine.pop(config, None)
        if self._studies is None or trial is None:
            return
        try:
            if ms is None:
                self._studies.note(trial, "status", status)
            self._studies.finish(trial, ms)
        except StudiesError as error:
            self._alone(error)

    def drop(self, config: Config) -> None:
        """Give a claim back."""
        self.settle(config, "given back", None)

    def others(self) -> set[Config]:
        """What other processes work at; the dead do not count."""
        if self._studies is None:
            return set()
        try:
            if time.monotonic() > self._buried + studies.GRACE / 4:
                self._studies.bury(self._study)
                self._buried = time.monotonic()
            return set(self._look())
        except StudiesError as error:
            self._alone(error)
            return set()

    def _look(self) -> dict[Config, int]:
        assert self._studies is not None
        mine, now = set(self._mine.values()), time.monotonic()
        found: dict[Config, int] = {}
        for trial in self._studies.trials(self._study, TrialState.WAITING, TrialState.RUNNING):
            number = trial._trial_id
            if number in mine:
                continue
            if trial.state == TrialState.WAITING and now - self._waiting.setdefault(number, now) > studies.GRACE:
                self._studies.finish(number, None)  # who was killed before it had a heartbeat is not missed by it
                continue
            found.setdefault(Config.from_key(trial.user_attrs["claim"]["config"]), number)
        self._others = found
        return found

    def _alone(self, error: StudiesError) -> None:
        self._studies, self._others, self.quiet = None, {}, True
        self._note(f"{error}; this process goes on by itself")


def _parameters(template: Template, config: Config) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """The config for people to look at: values as they are, without those that do not matter."""
    space: dict[str, BaseDistribution] = {}
    for param in template.space:
        if len(param.values(config)) > 1:
            values = param.domain.values
            power = isinstance(param.domain, Pow2)
            space[param.name] = (
                IntDistribution(int(values[0]), int(values[-1]), log=True) if power else CategoricalDistribution(values)
            )
    return {name: config[name] for name in space}, space
