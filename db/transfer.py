"""Takes what is stored from one database to another: records out, records in, a snapshot to ship.

    records.write(file, transfer.export(store))
    report = transfer.add(store, records.read(file, "name"))
    transfer.freeze(store.path, Path("job.db"))

Measurements are facts: they are added where they are missing, and none is lost or changed. Of two winners for the same
fingerprint, kernel source and problem the one with better evidence is served: measured before static, then the higher
speed-up over the default in the race that it won, then the narrower interval, then the later. A winner whose
measurement is already here has been weighed, by the tuner or by an earlier import, and does not compete again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select
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
    """Add records as :func:`sparsek_tune.db.records.read` or :func:`export` give them, all or, on any error, none.

    In one transaction. Raises DatabaseError.
    """
    with store.session(write=True) as session:
        taking = _Taking(session)
        for record in records:
            taking.take(record)
        return Report(taking.added, taking.known, len(taking.served), tuple(taking.conflicts))


class _Taking:
    """Adds records within one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ids: dict[tuple[Any, ...], int] = {}
        self.added = self.known = 0
        self.served: set[tuple[int, int, int]] = set()
        self.conflicts: list[Conflict] = []

    def take(self, record: Record) -> None:
        config = json.dumps(record["config"], sort_keys=True, separators=(",", ":"))
        of = {
            "run_id": self._run(record["run"]),
            "device_id": self._id(DeviceRow, record["device"]),
            "template_id": self._id(TemplateRow, record["template"]),
            "problem_id": self._id(ProblemRow, record["problem"]),
            "config_id": self._id(ConfigRow, {"key": config}),
        }
        same = {**of, "status": record["status"], "created_at": record["created_at"]}
        if self._session.scalar(select(MeasurementRow.id).filter_by(**same)) is not None:
            self.known += 1
            return
        protocol = json.dumps(record["protocol"], sort_keys=True)
        row = MeasurementRow(**of, **{name: record[name] for name in _OWN}, protocol=protocol)
        self._session.add(row)
        self._session.flush()
        self.added += 1
        if record["winner"] is not None:
            self._compete(row, config, record)

    def _id(self, table: Any, values: dict[str, Any]) -> int:
        key = (table, *values.values())
        if key not in self._ids:
            self._ids[key] = row_id(self._session, table, values)
        return self._ids[key]

    def _run(self, run: dict[str, Any]) -> int:
        """The same run may have been exported while it ran: what it ended with is then new, the rest is not."""
        first = {name: run[name] for name in ("command", "host", "pid", "started_at")}
        key = (RunRow, *run.values())
        if key not in self._ids:
            row = self._session.scalar(select(RunRow).filter_by(**first))
            if row is None:
                row = RunRow(**run)
                self._session.add(row)
            elif row.outcome == "running":
                row.outcome, row.finished_at = run["outcome"], run["finished_at"]
            self._session.flush()
            self._ids[key] = row.id
        return self._ids[key]

    def _compete(self, row: MeasurementRow, config: str, record: Record) -> None:
        new = WinnerRow(
            device_id=row.device_id, template_id=row.template_id, problem_id=row.problem_id, measurement_id=row.id,
            **record["winner"], static=row.status == "static",
        )  # fmt: skip
        key = (row.device_id, row.template_id, row.problem_id)
        old = self._session.get(WinnerRow, key)
        served = new
        if old is not None:
            before = self._session.get_one(MeasurementRow, old.measurement_id)
            other = self._session.get_one(ConfigRow, before.config_id).key
            won = _strength(new, row, config) > _strength(old, before, other)
            pair = ((config, _speedup(new)), (other, _speedup(old)))
            if config != other:
                of = record["device"]["name"], record["template"]["name"], Problem(**record["problem"])
                self.conflicts.append(Conflict(*of, *pair[not won], *pair[won]))
            served = new if won else old
        if served is new:
            self._session.merge(new)
            self.served.add(key)


def _speedup(winner: WinnerRow) -> float | None:
    return winner.default_ms / winner.tuned_ms if winner.default_ms and winner.tuned_ms else None


def _strength(winner: WinnerRow, m: MeasurementRow, config: str) -> tuple[Any, ...]:
    """Of two winners the one with more of this is served: a total order, so it does not matter which came first."""
    width = (m.ci_high_ms - m.ci_low_ms) / m.median_ms if m.ci_low_ms and m.ci_high_ms and m.median_ms else 1e9
    return not winner.static, _speedup(winner) or 0.0, -width, m.created_at, config


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
