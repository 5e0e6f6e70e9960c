"""Writes measurements and winners, and reads them back for the tuner and the command line.

    with Store(path) as store:
        run = store.start_run("sparsek-tune run ...")
        m = store.record(device, template, problem, config, Measured("ok", median_ms=0.2, samples=50), run)
        store.set_winner(m, default_ms=0.3, tuned_ms=0.2)
        store.finish_run(run)

Every call is one transaction, committed when it returns: a kill loses nothing that was recorded. A connection lives no
longer than its call, so a Store may be used from any thread and carries nothing over a fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import exc, func, select
from sqlalchemy.orm import Session

from sparsek_tune.db import postgres, races, sqlite
from sparsek_tune.db.errors import DatabaseError, LostError, explain
from sparsek_tune.db.races import now
from sparsek_tune.db.reader import Entry, default_path
from sparsek_tune.db.schema import (
    OUTCOMES,
    STATUSES,
    Base,
    ConfigRow,
    DeviceRow,
    MeasurementRow,
    ProblemRow,
    RunRow,
    TemplateRow,
    WinnerRow,
)
from sparsek_tune.problem import Device, Problem

if TYPE_CHECKING:  # the package of the templates imports triton
    from sparsek_tune.kernel_templates.base import Config, Template

_PASSWORD = re.compile(r"(\w://[^\s:/@]*:)[^\s@]*(?=@)")  # in a URL
_Found = TypeVar("_Found")
TEXT = 8192  # characters of a command or a reason that are kept; exported records hold no more

__all__ = ["DatabaseError", "Measured", "Recorded", "Store", "Summary", "default_path"]


@dataclass(frozen=True)
class Measured:
    """What came of one attempt at one config.

    status: "ok" (verified and timed), "static" (verified; the time, if any, is the cost model's), or the way it failed:
    "infeasible" (constraint, spill), "compile", "timeout", "runtime" (launch or execution), "wrong" (bad result).
    median_ms, ci_low_ms, ci_high_ms: milliseconds, of "ok" and "static" alone; samples: how many timings they rest on.
    reason: why it failed. protocol: how it was measured (JSON values). Raises ValueError on any other combination.
    """

    status: str
    median_ms: float | None = None
    ci_low_ms: float | None = None
    ci_high_ms: float | None = None
    samples: int = 0
    reason: str = ""
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, but is {self.status!r}")
        times = [t for t in (self.median_ms, self.ci_low_ms, self.ci_high_ms) if t is not None]
        if not all(isfinite(t) and t > 0 for t in times):
            raise ValueError(f"median_ms, ci_low_ms and ci_high_ms must be finite and above 0, but are {times}")
        if self.status == "ok" and self.median_ms is None:
            raise ValueError("median_ms must be given where status is 'ok', but is None")
        if self.status not in ("ok", "static") and times:
            raise ValueError(f"median_ms must be None where status is {self.status!r}, but times are {times}")


@dataclass(frozen=True)
class Recorded:
    """A stored measurement: ``id`` is what :meth:`Store.set_winner` takes."""

    id: int
    config: Config
    result: Measured
    created_at: str


@dataclass(frozen=True)
class Summary:
    """All that is stored for one device, template and (projected) problem. ``counts``: attempts by status."""

    device: Device
    template: str
    source_hash: str
    problem: Problem
    counts: Mapping[str, int]
    winner: Entry | None


class Store:
    """The database ``where`` (None: :func:`default_path`): a file, made with its directories where it is missing, or a
    server, postgresql+psycopg://USER@HOST/DATABASE.

    ``read_only`` opens what exists and never writes: for looking at files of others. ``path``: the file, or the URL
    without its password; ``where``: with it. Every method raises DatabaseError (a subclass says what is wrong; the
    message how to mend it). No file is ever deleted or overwritten.
    """

    def __init__(self, where: str | os.PathLike[str] | None = None, *, read_only: bool = False) -> None:
        if isinstance(where, str) and "://" in where:
            self._backend = postgres.Server(where, read_only)
        else:
            self._backend = sqlite.File(Path(where) if where else default_path(), read_only)
        self.path: Path | str = self._backend.name
        self.where: Path | str = self._backend.where

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.close()

    @contextmanager
    def session(self, write: bool = False) -> Iterator[Session]:
        """One transaction; commits at the end of the block. For the modules of this package."""
        try:
            with Session(self._backend.write if write else self._backend.read) as session, session.begin():
                self._backend.begin(session.connection(), write)
                yield session
        except exc.DBAPIError as error:
            raise self._backend.explain(error) from error
        except sqlite3.Error as error:  # of the driver itself, past SQLAlchemy
            raise explain(Path(self.path), error) from error

    def ask(self, question: Callable[[Session], _Found]) -> _Found:
        """What ``question`` finds in one transaction. It is asked once more where the connection to a server is lost:
        reading twice harms nothing, as writing might."""
        try:
            with self.session() as session:
                return question(session)
        except LostError:
            with self.session() as session:
                return question(session)

    def start_run(self, command: str) -> int:
        """Note that ``command`` began to tune here; returns the run's id for :meth:`record`."""
        with self.session(write=True) as session:
            row = RunRow(
                command=text(_PASSWORD.sub(r"\1***", command)),
                host=socket.gethostname(),
                pid=os.getpid(),
                outcome="running",
                started_at=now(),
            )
            session.add(row)
            session.flush()
            return row.id

    def finish_run(self, run: int, outcome: str = "done") -> None:
        """Note how ``run`` ended: "done", "interrupted" or "failed". A run that was killed stays "running"."""
        if outcome not in OUTCOMES[1:]:
            raise ValueError(f"outcome must be one of {', '.join(OUTCOMES[1:])}, but is {outcome!r}")
        with self.session(write=True) as session:
            row = session.get_one(RunRow, run)
            row.outcome, row.finished_at = outcome, now()

    def record(
        self, device: Device, template: Template, problem: Problem, config: Config, result: Measured, run: int
    ) -> int:
        """Append one measurement and commit it; returns its id. ``problem`` is projected on ``template.fields``."""
        with self.session(write=True) as session:
            row = MeasurementRow(
                run_id=run,
                device_id=row_id(session, DeviceRow, device.as_dict()),
                template_id=row_id(session, TemplateRow, _template(template)),
                problem_id=row_id(session, ProblemRow, problem.project(template.fields)._asdict()),
                config_id=row_id(session, ConfigRow, {"key": config.key}),
                status=result.status,
                reason=text(result.reason),
                median_ms=result.median_ms,
                ci_low_ms=result.ci_low_ms,
                ci_high_ms=result.ci_high_ms,
                samples=result.samples,
                protocol=json.dumps(dict(result.protocol), sort_keys=True),
                created_at=now(),
            )
            session.add(row)
            session.flush()
            return row.id

    def measurements(self, device: Device, template: Template, problem: Problem, after: int = 0) -> list[Recorded]:
        """Everything recorded for exactly this fingerprint, template source and projected problem, oldest first; after:
        only what has a larger id."""
        query = (
            select(MeasurementRow, ConfigRow.key)
            .join(ConfigRow, ConfigRow.id == MeasurementRow.config_id)
            .join(DeviceRow, DeviceRow.id == MeasurementRow.device_id)
            .join(TemplateRow, TemplateRow.id == MeasurementRow.template_id)
            .join(ProblemRow, ProblemRow.id == MeasurementRow.problem_id)
            .where(
                *_equal(DeviceRow, device.as_dict()),
                *_equal(TemplateRow, _template(template)),
                *_equal(ProblemRow, problem.project(template.fields)._asdict()),
                MeasurementRow.id > after,
            )
            .order_by(MeasurementRow.id)
        )
        return self.ask(lambda session: [_recorded(row, key) for row, key in session.execute(query)])

    def set_winner(self, measurement: int, default_ms: float | None = None, tuned_ms: float | None = None) -> bool:
        """Note that ``measurement`` won a race for its device, template and problem: it is served from now on.

        default_ms, tuned_ms: the default's and this config's time (ms) in the race. Returns False, and changes nothing,
        where a static result would replace a measured one; what is served already is not noted twice. Raises ValueError
        unless the measurement exists and its status is "ok" or "static".
        """
        with self.session(write=True) as session:
            row = session.get(MeasurementRow, measurement)
            if row is None or row.status not in ("ok", "static"):
                found = "missing" if row is None else row.status
                raise ValueError(f"measurement {measurement} must be of status ok or static, but is {found}")
            old = session.get(WinnerRow, races.key_of(row))
            if old is not None and row.status == "static" and not old.static:
                return False
            if old is None or (old.measurement_id, old.default_ms, old.tuned_ms) != (row.id, default_ms, tuned_ms):
                races.decide(session, row, default_ms, tuned_ms)
            return True

    def winners(self) -> list[Entry]:
        """Every winner, oldest measurement first."""
        return self.ask(_winners)

    def summary(self) -> list[Summary]:
        """One row for each device, template and problem that was ever tried, in the order of their first attempts."""
        key = (MeasurementRow.device_id, MeasurementRow.template_id, MeasurementRow.problem_id)
        counts = (
            select(*key, MeasurementRow.status, func.count(), func.min(MeasurementRow.id).label("first"))
            .group_by(*key, MeasurementRow.status)
            .order_by("first")
        )

        def found(session: Session) -> list[Summary]:
            counted: dict[tuple[int, int, int], dict[str, int]] = {}
            for d, t, p, status, count, _ in map(tuple, session.execute(counts)):
                counted.setdefault((d, t, p), {})[status] = count
            devices = {r.id: _device(r) for r in session.scalars(select(DeviceRow))}
            templates = {r.id: r for r in session.scalars(select(TemplateRow))}
            problems = {r.id: _problem(r) for r in session.scalars(select(ProblemRow))}
            winners = {(e.device, e.template, e.source_hash, e.problem): e for e in _winners(session)}
            rows = [(devices[d], templates[t].name, templates[t].source_hash, problems[p]) for d, t, p in counted]
            return [Summary(*r, counts=c, winner=winners.get(r)) for r, c in zip(rows, counted.values(), strict=True)]

        return self.ask(found)


def text(said: str) -> str:
    """As much as is kept of ``said``, without what PostgreSQL cannot hold."""
    return said.replace("\0", "\N{REPLACEMENT CHARACTER}")[:TEXT]


def _equal(table: type[Base], values: Mapping[str, Any]) -> list[Any]:
    return [getattr(table, name) == value for name, value in values.items()]


def row_id(session: Session, table: Any, values: Mapping[str, Any]) -> int:
    """The id of the row that holds ``values``, added where there is none (safe: the writer holds the lock)."""
    found = session.scalar(select(table.id).where(*_equal(table, values)))
    if found is None:
        row = table(**values)
        session.add(row)
        session.flush()
        found = row.id
    return found


def _template(template: Template) -> dict[str, str]:
    space = repr([(p.name, p.domain.values) for p in template.space])
    version = hashlib.sha256(space.encode()).hexdigest()[:16]
    return {"name": template.name, "source_hash": template.source_hash, "space_version": version}


def _recorded(row: MeasurementRow, key: str) -> Recorded:
    from sparsek_tune.kernel_templates.base import Config

    result = Measured(
        row.status,
        row.median_ms,
        row.ci_low_ms,
        row.ci_high_ms,
        row.samples,
        row.reason,
        json.loads(row.protocol),
    )
    return Recorded(row.id, Config.from_key(key), result, row.created_at)


def _device(row: DeviceRow) -> Device:
    return Device(**{f: getattr(row, f) for f in Device.__dataclass_fields__})


def _problem(row: ProblemRow) -> Problem:
    return Problem(*(getattr(row, f) for f in Problem._fields))


def _winners(session: Session) -> list[Entry]:
    query = (
        select(WinnerRow, DeviceRow, TemplateRow, ProblemRow, ConfigRow.key, MeasurementRow.created_at)
        .join(DeviceRow, DeviceRow.id == WinnerRow.device_id)
        .join(TemplateRow, TemplateRow.id == WinnerRow.template_id)
        .join(ProblemRow, ProblemRow.id == WinnerRow.problem_id)
        .join(MeasurementRow, MeasurementRow.id == WinnerRow.measurement_id)
        .join(ConfigRow, ConfigRow.id == MeasurementRow.config_id)
        .order_by(MeasurementRow.id)
    )
    return [
        Entry(t.name, t.source_hash, _device(d), _problem(p), key, w.default_ms, w.tuned_ms, w.static, created)
        for w, d, t, p, key, created in session.execute(query)
    ]
