"""Takes what is stored from one database to another: records out, records in, a snapshot to ship.

    records.write(file, transfer.export(store))
    report = transfer.add(store, records.read(file, "name"))
    transfer.freeze(store.path, Path("job.db"))

Measurements and races are facts: they are added where they are missing, and none is lost or changed. What is served is
derived from all races that are known (see ``races``), so it does not matter which records come first.
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

from sparsek_tune.db import races, reader
from sparsek_tune.db.errors import SnapshotError, explain
from sparsek_tune.db.records import Record
from sparsek_tune.db.schema import (
    ConfigRow,
    DeviceRow,
    MeasurementRow,
    ProblemRow,
    RaceRow,
    RunRow,
    TemplateRow,
    WinnerRow,
)
from sparsek_tune.db.store import Store, row_id, text
from sparsek_tune.problem import Device, Problem

_RUN = ("command", "host", "pid", "outcome", "started_at", "finished_at")
_TEMPLATE = ("name", "source_hash", "space_version")
_UNWRITABLE = (  # of the file that is written; by primary code, or extended
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC, sqlite3.SQLITE_IOERR_TRUNCATE,
)  # fmt: skip
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

    def found(session: Session) -> list[Record]:
        won: dict[int, list[RaceRow]] = {}
        for race in session.scalars(select(RaceRow)):
            won.setdefault(race.measurement_id, []).append(race)
        return [_record(*tuple(row), won=won.get(row[0].id, [])) for row in session.execute(query)]

    return store.ask(found)


def _record(
    m: MeasurementRow, run: RunRow, device: Any, template: Any, problem: Any, key: str, winner: Any, won: list[RaceRow]
) -> Record:
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
        "races": sorted(map(races.portable, won), key=repr),
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


_Identity = tuple[Any, ...]  # of a measurement: ids of run, device, template, problem and config, status, moment


class _Taking:
    """Collects what is new in records, within one transaction, and adds it at the end."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ids: dict[Any, int] = {}
        names = (*(f"{x}_id" for x in ("run", "device", "template", "problem", "config")), "status", "created_at", "id")
        stored = session.execute(select(*(getattr(MeasurementRow, name) for name in names)))
        self._stored: dict[_Identity, int] = {tuple(identity): id for *identity, id in stored}
        self._runs = {(r.command, r.host, r.pid, r.started_at): r for r in session.scalars(select(RunRow))}
        self._count = 0
        self._new: dict[_Identity, dict[str, Any]] = {}
        self._raced: dict[races.Key, list[tuple[_Identity, Record]]] = {}

    def take(self, record: Record) -> None:
        self._count += 1
        of = {
            "run_id": self._run(record["run"]),
            "device_id": self._id(DeviceRow, record["device"]),
            "template_id": self._id(TemplateRow, record["template"]),
            "problem_id": self._id(ProblemRow, record["problem"]),
            "config_id": self._id(ConfigRow, {"key": reader.config_key(record["config"])}),
        }
        identity = (*of.values(), record["status"], record["created_at"])
        if identity not in self._stored and identity not in self._new:
            protocol = json.dumps(record["protocol"], sort_keys=True)
            own = {name: record[name] for name in _OWN}
            self._new[identity] = {**of, **own, "reason": text(record["reason"]), "protocol": protocol}
        if record["races"]:
            key = (of["device_id"], of["template_id"], of["problem_id"])
            self._raced.setdefault(key, []).append((identity, record))

    def finish(self) -> Report:
        """Add what was collected."""
        insert_new = insert(MeasurementRow).returning(MeasurementRow.id, sort_by_parameter_order=True)
        if self._new:
            ids = self._session.scalars(insert_new, list(self._new.values()))
            self._stored.update(zip(self._new, ids, strict=True))
        winners, conflicts = 0, []
        for key, found in self._raced.items():
            won = [(self._stored[identity], race) for identity, record in found for race in record["races"]]
            taken = races.take(self._session, key, won)
            winners += taken.changed
            record = found[0][1]
            of = record["device"]["name"], record["template"]["name"], Problem(**record["problem"])
            best = taken.served
            conflicts += [
                Conflict(*of, best.config, best.speedup, other.config, other.speedup)
                for other in taken.others
                if other.config != best.config
            ]
        return Report(len(self._new), self._count - len(self._new), winners, tuple(conflicts))

    def _id(self, table: Any, values: Mapping[str, Any]) -> int:
        key = (table, *sorted(values.items()))
        if key not in self._ids:
            self._ids[key] = row_id(self._session, table, values)
        return self._ids[key]

    def _run(self, run: dict[str, Any]) -> int:
        """The same run may have been exported while it ran: what it ended with is then new, the rest is not."""
        run = {**run, "command": text(run["command"])}
        key = (run["command"], run["host"], run["pid"], run["started_at"])
        row = self._runs.get(key)
        if row is None:
            row = self._runs[key] = RunRow(**run)
            self._session.add(row)
            self._session.flush()
        elif row.outcome == "running":
            row.outcome, row.finished_at = run["outcome"], run["finished_at"]
        return row.id


def snapshot(store: Store, target: Path) -> str:
    """:func:`freeze` what ``store`` holds, wherever it is."""
    if isinstance(store.path, Path):
        return freeze(store.path, target)
    with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch) / "copy.db") as copy:
        add(copy, export(store))
        return freeze(Path(copy.path), target)


def freeze(source: Path, target: Path) -> str:
    """Write a snapshot of the database ``source`` to ``target``: one file, whole or not there, that may not be written
    and needs no other beside it, in any directory. Returns its SHA-256. Raises DatabaseError, SnapshotError where it is
    about ``target``; an existing file stays.
    """
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            copy = Path(scratch) / "copy.db"
            with closing(reader.connect(source)) as connection:
                _copy(connection, source, copy, target)
            copy.chmod(0o444)
            digest = hashlib.sha256(copy.read_bytes()).hexdigest()
            os.link(copy, target)  # unlike a rename, replaces nothing
    except FileExistsError as error:
        raise SnapshotError(f"{target} exists already, and a snapshot is never changed: choose another name") from error
    except OSError as error:
        raise SnapshotError(f"{target} cannot be written: {error.strerror}") from error
    return digest


def _copy(connection: sqlite3.Connection, source: Path, copy: Path, target: Path) -> None:
    try:
        connection.execute("VACUUM INTO ?", (str(copy),))
    except sqlite3.Error as error:
        if error.sqlite_errorcode in _UNWRITABLE or error.sqlite_errorcode & 0xFF in _UNWRITABLE:
            raise SnapshotError(f"{target} cannot be written: {error}") from error
        raise explain(source, error) from error
