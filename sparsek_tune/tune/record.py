"""What is written down: every attempt as it ends, so that a run that stops at any moment loses none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsek_tune.db.store import Measured, Recorded, Store
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.measure import Estimate

INFEASIBLE, WRONG, FAILED = ("infeasible", "compile"), ("wrong",), ("timeout", "runtime")


class Ledger:
    """The attempts at one template and problem: those of earlier runs, and those that this run adds to the store."""

    def __init__(self, store: Store, device: Device, template: Template, problem: Problem, run: int) -> None:
        self._store, self._key, self._run = store, (device, template, problem), run
        # The latest attempt counts; a race repeats the configs that it compares.
        self.latest: dict[Config, Measured] = {}
        self._ids: dict[Config, int] = {}
        self._last_trial = ""  # when the latest config was timed outside of a race
        for row in store.measurements(device, template, problem):
            self._note(row)

    def _note(self, row: Recorded) -> None:
        self.latest[row.config], self._ids[row.config] = row.result, row.id
        if row.result.status == "ok" and row.result.protocol.get("phase") != "race":
            self._last_trial = row.created_at

    def fail(self, config: Config, status: str, reason: str, protocol: Mapping[str, Any]) -> None:
        self._add(config, Measured(status, reason=reason, protocol=protocol))

    def ok(self, config: Config, e: Estimate, protocol: Mapping[str, Any]) -> None:
        self._add(config, Measured("ok", e.median, e.low, e.high, e.samples, protocol=protocol))

    def static(self, config: Config, ms: float, protocol: Mapping[str, Any]) -> None:
        """A verified config without a GPU; ms: what the cost model says."""
        self._add(config, Measured("static", ms, protocol=protocol))

    def win(self, config: Config, default_ms: float | None, tuned_ms: float | None) -> None:
        """Serve ``config``, whose latest attempt is ok or static."""
        self._store.set_winner(self._ids[config], default_ms, tuned_ms)

    def winner(self) -> Any | None:
        """The stored winner (``db.reader.Entry``) of this very device, template source and problem, or None."""
        device, template, problem = self._key
        want = (device, template.name, template.source_hash, problem.project(template.fields))
        entries = (e for e in self._store.winners() if (e.device, e.template, e.source_hash, e.problem) == want)
        return next(entries, None)

    def unraced(self) -> bool:
        """Whether a config was timed after the stored winner's race, as by a run that was stopped before its own."""
        winner = self.winner()
        return winner is not None and self._last_trial > winner.created_at

    def times(self) -> dict[Config, float | None]:
        """Config to median ms, None for one that gave no time."""
        return {c: m.median_ms if m.status == "ok" else None for c, m in self.latest.items()}

    def ranking(self) -> list[Config]:
        """The timed configs, fastest first."""
        times = {c: ms for c, ms in self.times().items() if ms is not None}
        return sorted(times, key=lambda c: times[c])

    def count(self, statuses: tuple[str, ...] = ()) -> int:
        """How many configs ended in one of ``statuses`` (all where empty)."""
        return sum(1 for m in self.latest.values() if not statuses or m.status in statuses)

    def _add(self, config: Config, result: Measured) -> None:
        self._ids[config] = self._store.record(*self._key, config, result, self._run)
        self.latest[config] = result
