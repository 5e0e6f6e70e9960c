"""The portable form of what is stored: JSON lines, a header and then one measurement each, by ``record.schema.json``.

Reading runs nothing and trusts nothing: a line that is too long, no JSON, not by the schema or impossible in itself is
refused with its number, and with it the whole file.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, TextIO

from sparsek_tune.db.errors import DatabaseError

HEADER = {"format": "sparsek-tune-records", "version": 2}
_VERSIONS = (1, 2)
SCHEMA = Path(__file__).with_name("record.schema.json")
LONGEST = 1 << 18  # characters of a line
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)  # what a compressed file raises

_TIMED = ("ok", "static")
_LAST_YEAR = 9998  # a later race has to find a later moment

Record = dict[str, Any]


class RecordError(DatabaseError):
    """A file of records that cannot be taken; the message holds its name and the line."""


def write(file: TextIO, records: Iterable[Record]) -> int:
    """Write records, as :func:`sparsek_tune.db.transfer.export` gives them, to an open text file; returns how many."""
    count = 0
    file.write(json.dumps(HEADER) + "\n")
    for record in records:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        count += 1
    return count


def open_text(path: Path) -> TextIO:
    """A file of records, opened for :func:`read`; compressed where its name ends in .gz or .xz. Raises OSError."""
    opener: Callable[..., Any] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8")


def read(file: TextIO, name: str) -> list[Record]:
    """All records of an open text file. Raises RecordError, which calls it ``name``, for any line that is not right;
    OSError where it cannot be read."""
    records: list[Record] = []
    number, version = 0, 0
    try:
        for number, line in enumerate(_lines(file), 1):
            document = _parse(line)
            if number == 1:
                version = _version(document)
            else:
                _check(document, version)
                records.append(document)
    except (ValueError, RecursionError, *_DAMAGED) as error:
        words = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RecordError(f"{name}, line {max(number, 1)}: {words}; nothing was taken from the file") from error
    if not number:
        raise RecordError(f"{name} is empty: a file that `sparsek-tune export` wrote begins with a header")
    return _with_races(records) if version == 1 else records


def _with_races(records: Iterable[Record]) -> list[Record]:
    """Records of version 1, which knew of each winner's last race alone, as those of today. By the rule of migration
    0002: decided not before the newest attempt, in sight of every attempt that could have won an earlier one."""
    records = list(records)
    newest: dict[str, str] = {}
    known: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for record in records:
        key, moment = _problem(record), record["created_at"]
        newest[key] = max(newest.get(key, moment), moment)
        if record["status"] in _TIMED:
            run = {name: record["run"][name] for name in ("host", "pid", "started_at")}
            known.setdefault(key, {})[tuple(run.values())] = run

    def races(record: Record) -> list[dict[str, Any]]:
        key = _problem(record)
        runs = [run for _, run in sorted(known.get(key, {}).items())]
        return [{**record["winner"], "created_at": newest[key], "known": runs}] if record["winner"] else []

    return [record | {"races": races(record)} for record in records]


def _problem(record: Record) -> str:
    return json.dumps([record[name] for name in ("device", "template", "problem")], sort_keys=True)


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(f"is longer than {LONGEST} characters")
        yield line


def _parse(line: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        document = json.loads(line.rstrip("\n"), parse_constant=refuse, parse_float=_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from error
    json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair is no text: raises ValueError
    return document


def _finite(number: str) -> float:
    if not isfinite(x := float(number)):
        raise ValueError(f"{number} is beyond all numbers")
    return x


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _version(header: Any) -> int:
    """Of a file that begins with ``header``. Raises ValueError unless it is one that is known."""
    if not isinstance(header, dict) or header.get("format") != HEADER["format"]:
        raise ValueError(f"must be the header {json.dumps(HEADER)}")
    if (version := header.get("version")) not in _VERSIONS:
        known = " or ".join(map(str, _VERSIONS))
        raise ValueError(f"version must be {known}, but is {version!r}: upgrade sparsek-tune")
    return version


def _check(document: Any, version: int) -> None:
    """Raises ValueError that says where and why ``document`` is not a record of such a file."""
    from jsonschema.exceptions import best_match

    if error := best_match(_validator(version).iter_errors(document)):
        raise ValueError(f"{error.json_path}: {error.message[:200]}")
    _check_sense(document)
    if version > 1:
        _check_races(document)


@cache
def _validator(version: int) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    def integer(_: Any, x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool)  # JSON Schema takes 1.0 too; the columns are integers

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    kind = extend(Draft202012Validator, type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", integer))
    record = schema["$defs"]["record"]
    if version == 1:
        record["required"].remove("races")
        del record["properties"]["races"]
    return kind({"$ref": "#/$defs/record", "$defs": schema["$defs"]})


def _check_sense(record: Record) -> None:
    """What a schema cannot say."""
    timed = record["status"] in _TIMED
    low, median, high = record["ci_low_ms"], record["median_ms"], record["ci_high_ms"]
    given = [t for t in (low, median, high) if t is not None]
    if (given or record["winner"]) and not timed:
        raise ValueError(f"$: an attempt of status {record['status']} has neither times nor won a race")
    if record["status"] == "ok" and median is None:
        raise ValueError("$.median_ms: must be a time where status is ok, but is null")
    if given != sorted(given):
        raise ValueError(f"$: ci_low_ms, median_ms, ci_high_ms must ascend, but are {low}, {median}, {high}")
    for moment in (record["created_at"], record["run"]["started_at"], record["run"]["finished_at"]):
        if moment is not None:
            datetime.fromisoformat(moment)


def _check_races(record: Record) -> None:
    if record["races"] and record["status"] not in _TIMED:
        raise ValueError(f"$.races: an attempt of status {record['status']} has won no race")
    if record["winner"] is not None and not record["races"]:
        raise ValueError("$.winner: what is served must have won a race, but races is empty")
    for race in record["races"]:
        for moment in (race["created_at"], *(run["started_at"] for run in race["known"])):
            if datetime.fromisoformat(moment).year > _LAST_YEAR:
                raise ValueError(f"$.races: a moment must be before the year {_LAST_YEAR + 1}, but is {moment}")
