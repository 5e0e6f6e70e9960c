"""A tuning run as it goes, for programs: one JSON document a line, by ``event.schema.json``, written at once."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from sparsek_tune.command import BROKEN, Fault, fault_of
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.types import Event, Row, Trial, row_of

VERSION = 1
SCHEMA = Path(__file__).with_name("event.schema.json")


class EventLines:
    """Context of a run: a line "run" when it begins, one for every event, and a line "end", however it ends.

    out: None writes nothing. Where a line cannot be written, as its reader has gone or a disk is full, the run goes on
    without: what it measures is in the database. It then ends with the exit code BROKEN, if it is not to end with
    another one.
    """

    def __init__(self, out: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock, self._start = out, clock, clock()
        self._about: dict[str, Any] = {"database": None, "device": None, "static": None}
        self._rows: dict[tuple[str, Problem], Row] = {}
        self._broken: OSError | None = None

    def begin(
        self, database: Path, device: Device, effort: str, budget: float | None, problems: Sequence[Problem]
    ) -> None:
        self._about = {"database": str(database), "device": device.as_dict(), "static": device.static}
        self._write("run", **self._about, effort=effort, budget=budget, problems=[p._asdict() for p in problems])

    def show(self, event: Event) -> None:
        if event.row is not None:
            self._rows[event.row.template, event.row.problem] = event.row
        fields = event._asdict()
        fields.update(
            problem=event.problem._asdict(),
            trial=event.trial and event.trial._asdict(),
            row=event.row and _row(event.row),
        )
        self._write(fields.pop("kind"), **fields)

    def __enter__(self) -> EventLines:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        words, code = _ending(error)
        self._write("end", **self._about, rows=[_row(row) for row in self._rows.values()], error=words, exit_code=code)
        if self._broken is not None and error is None:
            why = self._broken.strerror or self._broken
            raise Fault(f"the events could not be written ({why}); all results are in the database", BROKEN)

    def _write(self, event: str, **fields: Any) -> None:
        if self._out is None:
            return
        seconds = round(self._clock() - self._start, 3)
        line = json.dumps({"schema": VERSION, "event": event, "seconds": seconds, **fields}, allow_nan=False)
        try:
            self._out.write(line + "\n")
            self._out.flush()
        except OSError as error:
            self._broken = error
            _discard(self._out)
            self._out = None


def event_of(document: Mapping[str, Any]) -> Event | None:
    """The event that a line holds, None where it is the line of a run's beginning or end."""
    if document["event"] in ("run", "end"):
        return None
    fields = {name: document[name] for name in Event._fields if name != "kind"}
    trial, row = fields["trial"], fields["row"]
    fields["problem"] = Problem(**fields["problem"])
    fields["trial"] = None if trial is None else Trial(**{**trial, "config": Config(trial["config"])})
    fields["row"] = None if row is None else row_of(row)
    return Event(document["event"], **fields)


def _row(row: Row) -> dict[str, Any]:
    return {**row._asdict(), "problem": row.problem._asdict()}


def _ending(error: BaseException | None) -> tuple[str | None, int]:
    if error is None:
        return None, 0
    if (fault := fault_of(error)) is not None:
        return fault.format_message(), fault.exit_code
    return f"{type(error).__name__}: {error}", BROKEN


def _discard(out: TextIO) -> None:
    """What could not be written would be tried again when the process ends: let it vanish."""
    with contextlib.suppress(OSError):  # no file behind it
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, out.fileno())
        os.close(nothing)
