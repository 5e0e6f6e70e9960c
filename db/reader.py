"""Reads winners for the runtime: standard library only, never writes, never raises.

Two sources, one answer (:class:`Winners`): the user's SQLite file, and the JSON files that ship with the package.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from sparsek_tune.db.errors import (
    ELSEWHERE,
    CorruptError,
    DatabaseError,
    MissingError,
    NewerSchemaError,
    ReadOnlyError,
    explain,
)
from sparsek_tune.problem import Device, Problem

APPLICATION_ID = int.from_bytes(b"SPTK", "big")
SCHEMA_VERSION = 2
BUSY_SECONDS = 30.0
SHIPPED = Path(__file__).parent / "pretuned"


class Entry(NamedTuple):
    """One winner. ``problem`` is projected on the template's fields; ``config`` is a Config key (JSON text)."""

    template: str
    source_hash: str
    device: Device
    problem: Problem
    config: str
    default_ms: float | None
    tuned_ms: float | None
    static: bool
    created_at: str
    shipped: bool = False


class Winners(NamedTuple):
    """What was found. ``reason`` says why it is empty or partial; ``broken`` whether that needs mending."""

    entries: tuple[Entry, ...]
    reason: str = ""
    broken: bool = False


def default_path() -> Path:
    """$SPARSEK_TUNE_CACHE (a file, or a directory for ``cache.db``), else ``cache.db`` in the user's cache directory.

    That is $XDG_CACHE_HOME/sparsek-tune (a relative one is ignored, as XDG demands), else ~/.cache/sparsek-tune.
    Raises DatabaseError where there is no home directory either.
    """
    if chosen := os.environ.get("SPARSEK_TUNE_CACHE"):
        if "://" in chosen:
            raise DatabaseError(
                "SPARSEK_TUNE_CACHE must be a file: commands take a server by --storage, and programs read what "
                "`sparsek-tune freeze FILE --storage URL` writes"
            )
        return file_of(chosen)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        return Path(xdg, "sparsek-tune", "cache.db")
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise DatabaseError("there is no home directory to keep the database in: set SPARSEK_TUNE_CACHE to a file")
    return Path(home, ".cache", "sparsek-tune", "cache.db")


def file_of(text: str) -> Path:
    """The database file that ``text`` names: ``cache.db`` in it where it is a directory, or ends as one."""
    path = Path(os.path.expanduser(text))
    return path / "cache.db" if path.is_dir() or text.endswith(os.sep) else path


def is_there(path: Path) -> bool:
    """Whether there is a file. Raises ReadOnlyError where there is a directory or a pipe."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    except OSError:  # SQLite will say what
        return True
    if stat.S_ISDIR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):  # a pipe would be waited for without end
        raise ReadOnlyError(f"the database {path} is {'a directory' if stat.S_ISDIR(mode) else 'no file'}: {ELSEWHERE}")
    return True


def connect(path: Path) -> sqlite3.Connection:
    """A read-only connection to the database ``path``, checked to be ours. Raises DatabaseError."""
    if not is_there(path):
        raise MissingError(f"there is no database {path} yet: `sparsek-tune run` makes it")
    try:
        return _open_checked(path, "mode=ro")
    except sqlite3.Error as error:
        if not _is_frozen(path, error):
            raise explain(path, error) from error
    try:  # a WAL file in a directory that cannot be written opens only if it is promised not to change
        return _open_checked(path, "mode=ro&immutable=1")
    except sqlite3.Error as error:
        raise explain(path, error) from error


def schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """The file's ``user_version``; 0 where it is empty. Raises DatabaseError where it is not ours or newer than us."""

    def ask(sql: str) -> int:
        return connection.execute(sql).fetchone()[0]

    version, tables = ask("PRAGMA user_version"), ask("SELECT count(*) FROM sqlite_master")
    if ask("PRAGMA application_id") != APPLICATION_ID and (version or tables):
        raise CorruptError(f"the database {path} belongs to another program: {ELSEWHERE}")
    if version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"the database {path} has schema {version}, but this version of sparsek-tune knows up to {SCHEMA_VERSION}: "
            f"upgrade sparsek-tune or {ELSEWHERE}"
        )
    return version


def load(path: str | os.PathLike[str] | None, kind: str, cc: int | None) -> Winners:
    """Every winner of ``kind`` and of capability ``cc`` (None: any) in the database ``path`` (None: the default)."""
    try:
        file = Path(path) if path else default_path()
        try:
            connection = connect(file)
            try:
                rows = (
                    connection.execute(_WINNERS, (kind, cc, cc)).fetchall() if schema_version(connection, file) else []
                )
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise explain(file, error) from error
        entries = tuple(_entry(row) for row in rows)
    except MissingError as error:
        return Winners((), str(error))
    except Exception as error:  # the runtime must go on, whatever is wrong with a file
        return Winners((), str(error) or repr(error), broken=True)
    return Winners(
        entries, "" if entries else f"the database {file} holds no winner for {kind}:{'any' if cc is None else cc}"
    )


def load_shipped(kind: str, cc: int | None, directory: Path | None = None) -> Winners:
    """Every winner for ``kind`` and ``cc`` (None: any) in the JSON files of ``directory`` (None: the package's own).

    One file a GPU: ``{"format": 1, "device": {...}, "winners": [{"template": ..., "source_hash": ..., "problem": {...},
    "config": {...}, "default_ms": ..., "tuned_ms": ..., "static": false, "created_at": ...}, ...]}``, where "device"
    holds the fields of Device and "problem" those of Problem. Another file is passed over; the reason names it.
    """
    entries: list[Entry] = []
    faults: list[str] = []
    for file in sorted((directory or SHIPPED).glob("*.json")):
        try:
            found = parse(json.loads(file.read_text(encoding="utf-8")))
            entries += [e for e in found if e.device.kind == kind and cc in (None, e.device.cc)]
        except Exception as error:  # one bad file must not take the others along
            faults.append(f"the shipped configs {file} are unusable: {error!r}")
    return Winners(tuple(entries), "; ".join(faults), broken=bool(faults))


def config_key(config: dict[str, Any]) -> str:
    """``Config(config).key``, without the templates, whose package imports triton."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def parse(document: dict[str, Any]) -> list[Entry]:
    """The entries of one shipped document (:func:`load_shipped`). Raises ValueError, KeyError or TypeError."""
    if document["format"] != 1:
        raise ValueError(f"format must be 1, but is {document['format']!r}")
    device = Device(**document["device"])
    return [
        Entry(
            template=w["template"],
            source_hash=w["source_hash"],
            device=device,
            problem=Problem(**w["problem"]),
            config=config_key(dict(w["config"])),
            default_ms=w["default_ms"],
            tuned_ms=w["tuned_ms"],
            static=bool(w["static"]),
            created_at=w["created_at"],
            shipped=True,
        )
        for w in document["winners"]
    ]


def document(entries: list[Entry]) -> dict[str, Any]:
    """The shipped form of ``entries``, all of one device; the inverse of :func:`parse`. Raises ValueError."""
    devices = {e.device for e in entries}
    if len(devices) != 1:
        raise ValueError(f"entries must be of one device, but are of {len(devices)}")
    return {
        "format": 1,
        "device": devices.pop().as_dict(),
        "winners": [
            {
                "template": e.template,
                "source_hash": e.source_hash,
                "problem": e.problem._asdict(),
                "config": json.loads(e.config),
                "default_ms": e.default_ms,
                "tuned_ms": e.tuned_ms,
                "static": e.static,
                "created_at": e.created_at,
            }
            for e in entries
        ],
    }


_DEVICE = ("kind", "cc", "name", "sm_count", "smem", "l2", "memory", "driver", "cuda", "triton", "torch")
_WINNERS = f"""
SELECT t.name, t.source_hash, {", ".join(f"d.{f}" for f in _DEVICE)}, {", ".join(f"p.{f}" for f in Problem._fields)},
       c.key, w.default_ms, w.tuned_ms, w.static, m.created_at
FROM winner w JOIN device d ON d.id = w.device_id JOIN template t ON t.id = w.template_id
     JOIN problem p ON p.id = w.problem_id JOIN measurement m ON m.id = w.measurement_id
     JOIN config c ON c.id = m.config_id
WHERE d.kind = ? AND (? IS NULL OR d.cc = ?)
ORDER BY m.id
"""


def _entry(row: tuple[Any, ...]) -> Entry:
    name, source_hash, *rest = row
    device = Device(**dict(zip(_DEVICE, rest, strict=False)))
    problem = Problem(*rest[len(_DEVICE) : len(_DEVICE) + len(Problem._fields)])
    config, default_ms, tuned_ms, static, created_at = rest[-5:]
    return Entry(name, source_hash, device, problem, config, default_ms, tuned_ms, bool(static), created_at)


# A full disk has no room for the index of the log, which any other process that has the file open would have made.
_NO_INDEX = (sqlite3.SQLITE_IOERR_SHMOPEN, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMMAP)


def _is_frozen(path: Path, error: sqlite3.Error) -> bool:
    """Whether ``error`` is that of a place that cannot be written, and the file is whole without a journal."""
    code = error.sqlite_errorcode
    if code & 0xFF not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and code not in _NO_INDEX:
        return False
    journals = (Path(f"{path}-wal"), Path(f"{path}-journal"))
    return not any(j.exists() and j.stat().st_size for j in journals)


def _open_checked(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?{mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        schema_version(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection
