"""Takes what is stored from one database to another: records out, records in, a snapshot to ship.

    records.write(file, transfer.export(store))
    report = transfer.add(store, records.read(file, "name"))
    transfer.freeze(store.path, Path("job.db"))

Measurements are facts: they are added where they are missing, and none is lost or changed. Of two winners for the same
fingerprint, kernel source and problem the one with better evidence is served: measured before static, then the higher
speed-up over the default in the race that it won, then the narrower interval, then the later: a total order, so among
measurements that are new here it does not matter which comes first. The winner of a measurement that is already here
has been weighed, by the tuner or by an earlier import, and competes only where nothing is served yet: an old copy must
not bring back what a later race replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from sparsek_tune.db import reader
from sparsek_tune.db.errors import DatabaseError, ReadOnlyError, explain
from sparsek_tune.db.records import Record
from sparsek_tune.db.schema import ConfigRow, DeviceRow, MeasurementRow, ProblemRow, RunRow, TemplateRow, WinnerRow
from sparsek_tune.db.store import Store, row_id
from sparsek_tune.problem import Device, Problem

_RUN = ("command", "host", "pid", "outcome", "started_at", "finished_at")
_TEMPLATE = ("name", "source_hash", "space_version")
_OWN = ("status", "reason", "median_ms", "ci_low_ms", "ci_high_ms", "samples", "created_at")


class Conflict(NamedTuple):
    """Two configs that won the same problem. Speed-ups: over the default, each in its race; None without one."""

    device: str
    template: str
    problem: Problem
    served: str
    served_speedup: float | None
    other: str
    other_speedup: float | None


class Report(NamedTuple):
    """added: measurements that were new here; known: those that were not; winners: how many are served anew."""

    added: int
    known: int
    winners: int
    conflicts: tuple[Conflict, ...]


def export(store: Store) -> list[Record]:
    """Every measurement of ``store``, oldest first, with all that it depends on. Raises DatabaseError."""
    query = (
        select(MeasurementRow, RunRow, DeviceRow, TemplateRow, ProblemRow, ConfigRow.key, WinnerRow)
        .join(RunRow, RunRow.id == MeasurementRow.run_id)
        .join(DeviceRow, DeviceRow.id == MeasurementRow.device_id)
        .join(TemplateRow, TemplateRow.id == MeasurementRow.template_id)
        .join(ProblemRow, ProblemRow.id == MeasurementRow.problem_id)
        .join(ConfigRow, ConfigRow.id == MeasurementRow.config_id)
        .outerjoin(WinnerRow, WinnerRow.measurement_id == MeasurementRow.id)
        .order_by(MeasurementRow.id)
    )
    with store.session() as session:
        return [_record(*row) for row in session.execute(query)]


def _record(m: MeasurementRow, run: RunRow, device: Any, template: Any, problem: Any, key: str, winner: Any) -> Record:
    def fields(row: Any, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(row, name) for name in names}

    return {
        "device": fields(device, Device.__dataclass_fields__),
        "template": fields(template, _TEMPLATE),
        "problem": fields(problem, Problem._fields),
        "config": json.loads(key),
        **fields(m, _OWN),
        "protocol": json.loads(m.protocol),
        "run": fields(run, _RUN),
        "winner": winner and fields(winner, ("default_ms", "tuned_ms")),
    }


def add(store: Store, records: Iterable[Record]) -> Report:
    """Add records as :func:`sparsek_tune.db.records.read` gives them, all or, on any error, none.

    In one transaction. Raises DatabaseError.
    """
    with store.session(write=True) as session:
        taking = _Taking(session)
        for record in records:
            taking.take(record)
        return taking.finish()


class _Claim(NamedTuple):
    """A winner. place: of its measurement in what is added, or minus its id; row: what is stored of it, {} if it is."""

    place: int
    config: str
    speedup: float | None
    strength: tuple[Any, ...]
    row: dict[str, Any]


_Key = tuple[int, int, int]


class _Taking:
    """Collects what is new in records, within one transaction, and adds it at the end."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ids: dict[Any, int] = {}
        names = (*(f"{x}_id" for x in ("run", "device", "template", "problem", "config")), "status", "created_at")
        columns = [getattr(MeasurementRow, name) for name in names]
        self._known = set(map(tuple, session.execute(select(*columns))))
        self._runs = {(r.command, r.host, r.pid, r.started_at): r for r in session.scalars(select(RunRow))}
        self._count = 0
        self._new: list[dict[str, Any]] = []
        self._best: dict[_Key, _Claim | None] = {}
        self._lost: list[tuple[_Key, str, str, Problem, _Claim]] = []

    def take(self, record: Record) -> None:
        self._count += 1
        config = reader.config_key(record["config"])
        of = {
            "run_id": self._run(record["run"]),
            "device_id": self._id(DeviceRow, record["device"]),
            "template_id": self._id(TemplateRow, record["template"]),
            "problem_id": self._id(ProblemRow, record["problem"]),
            "config_id": self._id(ConfigRow, {"key": config}),
        }
        identity = (*of.values(), record["status"], record["created_at"])
        key = (of["device_id"], of["template_id"], of["problem_id"])
        known = identity in self._known
        if not known:
            self._known.add(identity)
            protocol = json.dumps(record["protocol"], sort_keys=True)
            self._new.append({**of, **{name: record[name] for name in _OWN}, "protocol": protocol})
        if record["winner"] is not None and (not known or self._served(key) is None):
            place = len(self._new) - 1 if not known else self._place(of, record)
            self._compete(key, place, config, record)

    def finish(self) -> Report:
        """Add what was collected."""
        insert_new = insert(MeasurementRow).returning(MeasurementRow.id, sort_by_parameter_order=True)
        ids = list(self._session.scalars(insert_new, self._new)) if self._new else []
        anew = {key: claim for key, claim in self._best.items() if claim is not None and claim.row}
        for (device, template, problem), claim in anew.items():
            measurement = ids[claim.place] if claim.place >= 0 else -claim.place
            of = {"device_id": device, "template_id": template, "problem_id": problem, "measurement_id": measurement}
            self._session.merge(WinnerRow(**of, **claim.row))
        conflicts = [
            Conflict(device, template, problem, best.config, best.speedup, lost.config, lost.speedup)
            for key, device, template, problem, lost in self._lost
            if (best := self._best[key]) is not None and best.config != lost.config
        ]
        return Report(len(self._new), self._count - len(self._new), len(anew), tuple(conflicts))

    def _id(self, table: Any, values: Mapping[str, Any]) -> int:
        key = (table, *sorted(values.items()))
        if key not in self._ids:
            self._ids[key] = row_id(self._session, table, values)
        return self._ids[key]

    def _run(self, run: dict[str, Any]) -> int:
        """The same run may have been exported while it ran: what it ended with is then new, the rest is not."""
        key = (run["command"], run["host"], run["pid"], run["started_at"])
        row = self._runs.get(key)
        if row is None:
            row = self._runs[key] = RunRow(**run)
            self._session.add(row)
            self._session.flush()
        elif row.outcome == "running":
            row.outcome, row.finished_at = run["outcome"], run["finished_at"]
        return row.id

    def _place(self, of: dict[str, int], record: Record) -> int:
        """Of a measurement that is known: where it is among the new ones, or its id, negative."""
        same = {**of, "status": record["status"], "created_at": record["created_at"]}
        for place, row in enumerate(self._new):
            if same.items() <= row.items():
                return place
        return -self._session.scalars(select(MeasurementRow.id).filter_by(**same)).first()  # type: ignore[operator]

    def _served(self, key: _Key) -> _Claim | None:
        if key not in self._best:
            winner = self._session.get(WinnerRow, key)
            if winner is None:
                self._best[key] = None
            else:
                m = self._session.get_one(MeasurementRow, winner.measurement_id)
                config = self._session.get_one(ConfigRow, m.config_id).key
                times = m.median_ms, m.ci_low_ms, m.ci_high_ms
                race = winner.default_ms, winner.tuned_ms
                self._best[key] = _claim(-m.id, config, winner.static, race, times, m.created_at, {})
        return self._best[key]

    def _compete(self, key: _Key, place: int, config: str, record: Record) -> None:
        race = record["winner"]["default_ms"], record["winner"]["tuned_ms"]
        times = record["median_ms"], record["ci_low_ms"], record["ci_high_ms"]
        static = record["status"] == "static"
        row = {**record["winner"], "static": static}
        new, old = _claim(place, config, static, race, times, record["created_at"], row), self._served(key)
        won = old is None or new.strength > old.strength
        if won:
            self._best[key] = new
        if (lost := old if won else new) is not None:
            of = record["device"]["name"], record["template"]["name"], Problem(**record["problem"])
            self._lost.append((key, *of, lost))


def _claim(
    place: int, config: str, static: bool, race: tuple[float | None, float | None], times: tuple[float | None, ...],
    created_at: str, row: dict[str, Any],
) -> _Claim:  # fmt: skip
    """strength: of two winners the one with more is served."""
    default, tuned = race
    median, low, high = times
    speedup = default / tuned if default and tuned else None
    width = (high - low) / median if median and low and high else 1e9
    strength = (not static, speedup or 0.0, -width, created_at, config, default or 0.0, tuned or 0.0)
    return _Claim(place, config, speedup, strength, row)


def snapshot(store: Store, target: Path) -> str:
    """:func:`freeze` what ``store`` holds, wherever it is."""
    if isinstance(store.path, Path):
        return freeze(store.path, target)
    with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch) / "copy.db") as copy:
        add(copy, export(store))
        return freeze(Path(copy.path), target)


def freeze(source: Path, target: Path) -> str:
    """Write a snapshot of the database ``source`` to ``target``: one file, whole or not there, that may not be written
    and needs no other beside it, in any directory. Returns its SHA-256. Raises DatabaseError; an existing file stays.
    """
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            copy = Path(scratch) / "copy.db"
            with closing(reader.connect(source)) as connection:
                _copy(connection, source, copy)
            copy.chmod(0o444)
            digest = hashlib.sha256(copy.read_bytes()).hexdigest()
            os.link(copy, target)  # unlike a rename, replaces nothing
    except FileExistsError as error:
        raise DatabaseError(f"{target} exists already, and a snapshot is never changed: choose another name") from error
    except OSError as error:
        raise ReadOnlyError(f"{target} cannot be written: {error.strerror}") from error
    return digest


def _copy(connection: sqlite3.Connection, source: Path, copy: Path) -> None:
    try:
        connection.execute("VACUUM INTO ?", (str(copy),))
        with closing(sqlite3.connect(copy)) as made:
            made.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        damaged = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        raise explain(source if damaged else copy, error) from error
