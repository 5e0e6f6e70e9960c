"""What is written down: every attempt as it ends, so that a run that stops at any moment loses none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsek_tune.db.reader import Entry
from sparsek_tune.db.store import Measured, Recorded, Store
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.measure import Estimate

INFEASIBLE, WRONG, FAILED = ("infeasible", "compile"), ("wrong",), ("timeout", "runtime")


def failed(status: str, reason: str, protocol: Mapping[str, Any]) -> Measured:
    return Measured(status, reason=reason, protocol=protocol)


def timed(e: Estimate, protocol: Mapping[str, Any]) -> Measured:
    return Measured("ok", e.median, e.low, e.high, e.samples, protocol=protocol)


def winner_of(entries: Iterable[Entry], device: Device, template: Template, problem: Problem) -> Entry | None:
    """Of stored winners the one of this very device, template source and problem, or None."""
    want = (device, template.name, template.source_hash, problem.project(template.fields))
    return next((e for e in entries if (e.device, e.template, e.source_hash, e.problem) == want), None)


class Ledger:
    """The attempts at one template and problem: those of earlier runs, and those that this run adds to the store."""

    def __init__(self, store: Store, device: Device, template: Template, problem: Problem, run: int) -> None:
        self._store, self._key, self._run = store, (device, template, problem), run
        # The latest attempt counts; a race repeats the configs that it compares.
        self.latest: dict[Config, Measured] = {}
        self._ids: dict[Config, int] = {}
        self._last_trial = ""  # when the latest config was timed outside of a race
        self.best_ms: float | None = None  # of all that were timed
        self._seen = 0  # measurements of the store up to this one are known
        self.refresh()

    def refresh(self) -> dict[Config, Measured]:
        """Take in what others added to the store meanwhile; returns that."""
        new = {}
        for row in self._store.measurements(*self._key, after=self._seen):
            self._seen = row.id
            if self._ids.get(row.config, 0) < row.id:  # not by this ledger itself
                self._note(row)
                new[row.config] = row.result
        return new

    def _note(self, row: Recorded) -> None:
        self._ids[row.config] = row.id
        self._set(row.config, row.result)
        if row.result.status == "ok" and row.result.protocol.get("phase") != "race":
            self._last_trial = row.created_at

    def add(self, config: Config, result: Measured) -> None:
        """Record one attempt."""
        self._ids[config] = self._store.record(*self._key, config, result, self._run)
        self._set(config, result)

    def win(self, config: Config, default_ms: float | None, tuned_ms: float | None) -> None:
        """Serve ``config``, whose latest attempt is ok or static."""
        self._store.set_winner(self._ids[config], default_ms, tuned_ms)

    def winner(self) -> Entry | None:
        """The stored winner of this very device, template source and problem."""
        return winner_of(self._store.winners(), *self._key)

    def unraced(self) -> bool:
        """Whether a config was timed after the stored winner's race, as by a run that was stopped before its own."""
        winner = self.winner()
        return winner is not None and self._last_trial > winner.created_at

    def times(self) -> dict[Config, float | None]:
        """Config to median ms, None for one that gave no time."""
        return {c: m.median_ms if m.status == "ok" else None for c, m in self.latest.items()}

    def time(self, config: Config) -> float | None:
        """The median (ms) of ``config``; None where it gave none, or was not tried."""
        result = self.latest.get(config)
        return result.median_ms if result is not None and result.status == "ok" else None

    def ranking(self) -> list[Config]:
        """The timed configs, fastest first."""
        times = {c: ms for c, ms in self.times().items() if ms is not None}
        return sorted(times, key=lambda c: times[c])

    def count(self, statuses: tuple[str, ...] = ()) -> int:
        """How many configs ended in one of ``statuses`` (all where empty)."""
        return sum(m.status in statuses for m in self.latest.values()) if statuses else len(self.latest)

    def _set(self, config: Config, result: Measured) -> None:
        before = self.time(config)
        self.latest[config] = result
        now = self.time(config)
        if before is not None and before == self.best_ms:
            self.best_ms = min((ms for ms in self.times().values() if ms is not None), default=None)
        elif now is not None and (self.best_ms is None or now < self.best_ms):
            self.best_ms = now
