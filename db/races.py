"""Races are facts: which config won, with what times, when, and which runs' races it replaced. Winners are derived from
them.

A race stands unless a later one replaced those of the run whose measurement won it. Of those that stand the one with
the best evidence is served: measured before static, then the higher speed-up over the default, then the narrower
interval, then the later measurement: a total order. So what is served depends on the set of races alone, not on the
order in which a database learnt of them. A race that is held again replaces what that database served; no old copy
brings that back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from sparsek_tune.db.schema import ConfigRow, MeasurementRow, RaceRow, RunRow, WinnerRow

Key = tuple[int, int, int]  # ids of device, template and problem
Run = tuple[str, int, str]  # host, process id, start
_RUN = ("host", "pid", "started_at")


class Race(NamedTuple):
    """run: the one that the winning measurement belongs to; known: the runs whose races were replaced, it included."""

    measurement: int
    config: str
    static: bool
    width: float
    measured_at: str
    run: Run
    default_ms: float | None
    tuned_ms: float | None
    created_at: str
    known: frozenset[Run]

    @property
    def speedup(self) -> float | None:
        """Over the default; None without a time of either."""
        return self.default_ms / self.tuned_ms if self.default_ms and self.tuned_ms else None

    @property
    def strength(self) -> tuple[Any, ...]:
        """Of two races that stand the one with more is served."""
        times = self.default_ms or 0.0, self.tuned_ms or 0.0
        evidence = not self.static, self.speedup or 0.0, -self.width, self.measured_at
        return (*evidence, self.config, *times, self.run, self.created_at)


def standing(races: Iterable[Race]) -> list[Race]:
    """The races that no other replaced, the one to serve first. Static ones count only where nothing was measured."""
    races = list(races)
    races = [r for r in races if not r.static] or races
    last: dict[Run, str] = {}
    for race in races:
        for run in race.known:
            last[run] = max(last.get(run, ""), race.created_at)
    found = [r for r in races if r.created_at >= last.get(r.run, "")]
    return sorted(found, key=lambda r: r.strength, reverse=True)


def of(session: Session, key: Key) -> list[Race]:
    """All races for one device, template and problem."""
    query = (
        select(RaceRow, MeasurementRow, RunRow, ConfigRow.key)
        .join(MeasurementRow, MeasurementRow.id == RaceRow.measurement_id)
        .join(RunRow, RunRow.id == MeasurementRow.run_id)
        .join(ConfigRow, ConfigRow.id == MeasurementRow.config_id)
        .where(*(c == x for c, x in zip(_KEY, key, strict=True)))
    )
    return [_race(*row) for row in session.execute(query)]


def decide(session: Session, row: MeasurementRow, default_ms: float | None, tuned_ms: float | None) -> None:
    """Add a race that ``row`` has won just now, and serve it: it replaces all that stand. (The clock of the host that
    held one of them may be ahead of ours.)"""
    key = key_of(row)
    there = of(session, key)
    run = session.get_one(RunRow, row.run_id)
    known = {(run.host, run.pid, run.started_at)} | {r.run for r in standing(there)}
    moment = max([now(), *(_after(r.created_at) for r in there)])
    race = {"default_ms": default_ms, "tuned_ms": tuned_ms, "created_at": moment, "known": _named(known)}
    take(session, key, [(row.id, race)])


class Taken(NamedTuple):
    """changed: whether another race is served than before; others: standing ones that were served or unknown before."""

    changed: bool
    served: Race
    others: list[Race]


def take(session: Session, key: Key, won: Iterable[tuple[int, Mapping[str, Any]]]) -> Taken:
    """Add the races that measurements (by id) of ``key`` won, in their portable form, where they are missing, and serve
    what then is to be served. There must be one race."""
    before = of(session, key)
    there = {(r.measurement, r.default_ms, r.tuned_ms, r.created_at, r.known) for r in before}
    rows = []
    for measurement, race in won:
        times = race["default_ms"], race["tuned_ms"], race["created_at"]
        identity = (measurement, *times, _runs(race["known"]))
        if identity not in there:
            there.add(identity)
            rows.append({**race, "measurement_id": measurement, "known": json.dumps(race["known"])})
    if rows:
        session.execute(insert(RaceRow), rows)
    best, *others = standing(of(session, key))
    weighed = set(before) - set(standing(before)[:1])
    return Taken(_serve(session, key, best), best, [r for r in others if r not in weighed])


def _serve(session: Session, key: Key, race: Race) -> bool:
    wanted = {"measurement_id": race.measurement, "static": race.static}
    wanted |= {"default_ms": race.default_ms, "tuned_ms": race.tuned_ms}
    row = session.get(WinnerRow, key)
    if row is not None and all(getattr(row, name) == value for name, value in wanted.items()):
        return False
    session.merge(WinnerRow(device_id=key[0], template_id=key[1], problem_id=key[2], **wanted))
    return True


def portable(row: RaceRow) -> dict[str, Any]:
    """A race as records hold it."""
    known = _named(_runs(json.loads(row.known)))
    return {"default_ms": row.default_ms, "tuned_ms": row.tuned_ms, "created_at": row.created_at, "known": known}


def _named(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The portable form of runs, in one order."""
    return [dict(zip(_RUN, run, strict=True)) for run in sorted(runs)]


def key_of(row: MeasurementRow) -> Key:
    return (row.device_id, row.template_id, row.problem_id)


def now() -> str:
    """This moment, as the tables hold it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _after(moment: str) -> str:
    return (datetime.fromisoformat(moment) + timedelta(microseconds=1)).isoformat(timespec="microseconds")


def _runs(known: Iterable[Mapping[str, Any]]) -> frozenset[Run]:
    return frozenset((run["host"], run["pid"], run["started_at"]) for run in known)


def _race(race: RaceRow, m: MeasurementRow, run: RunRow, config: str) -> Race:
    low, median, high = m.ci_low_ms, m.median_ms, m.ci_high_ms
    return Race(
        measurement=m.id,
        config=config,
        static=m.status == "static",
        width=(high - low) / median if median and low and high else 1e9,
        measured_at=m.created_at,
        run=(run.host, run.pid, run.started_at),
        default_ms=race.default_ms,
        tuned_ms=race.tuned_ms,
        created_at=race.created_at,
        known=_runs(json.loads(race.known)),
    )


_KEY = (MeasurementRow.device_id, MeasurementRow.template_id, MeasurementRow.problem_id)
