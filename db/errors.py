"""What can go wrong with a database file, in words that say which file and how to mend it. Standard library only."""

from __future__ import annotations

import sqlite3
from os import PathLike

Path = str | PathLike[str]


class DatabaseError(Exception):
    """The database cannot serve. The message holds the path and the way out; the file is left as it is."""


class MissingError(DatabaseError):
    """There is no file."""


class CorruptError(DatabaseError):
    """The file is no SQLite database, or a damaged one, or another program's."""


class NewerSchemaError(DatabaseError):
    """The file was written by a newer version of this package."""


class ReadOnlyError(DatabaseError):
    """The file, or the directory that it lies in, cannot be written (or not even opened)."""


class LockedError(DatabaseError):
    """Another process held the file for longer than the busy timeout."""


class LostError(DatabaseError):
    """No connection to the server could be made, or it broke: what was not committed is not there."""


class FullError(DatabaseError):
    """The disk, or a quota, took no more bytes."""


class SnapshotError(DatabaseError):
    """A snapshot cannot be written where it was to be, or is there already. The database itself is as it should be."""


ELSEWHERE = "name another file by --storage or SPARSEK_TUNE_CACHE"

# By primary SQLite result code; an extended code (primary + 256 * detail) wins where it is listed.
_EXPLAINED: dict[int, tuple[type[DatabaseError], str]] = {
    sqlite3.SQLITE_CORRUPT: (CorruptError, f"is damaged: move it away, restore a copy, or {ELSEWHERE}"),
    sqlite3.SQLITE_NOTADB: (CorruptError, f"is not a SQLite database: move it away or {ELSEWHERE}"),
    sqlite3.SQLITE_ERROR: (CorruptError, f"does not hold the tables it should: move it away or {ELSEWHERE}"),
    sqlite3.SQLITE_CONSTRAINT: (DatabaseError, "refused the row"),
    sqlite3.SQLITE_READONLY: (ReadOnlyError, f"cannot be written: mend the permissions or {ELSEWHERE}"),
    sqlite3.SQLITE_PERM: (ReadOnlyError, f"cannot be opened: mend the permissions or {ELSEWHERE}"),
    sqlite3.SQLITE_CANTOPEN: (ReadOnlyError, f"cannot be opened: mend the path or its permissions, or {ELSEWHERE}"),
    sqlite3.SQLITE_BUSY: (LockedError, "is held by another process: wait for it to end, then start again"),
    sqlite3.SQLITE_LOCKED: (LockedError, "is held by another process: wait for it to end, then start again"),
    sqlite3.SQLITE_FULL: (FullError, f"has no room to grow: free disk space or {ELSEWHERE}"),
    sqlite3.SQLITE_IOERR_WRITE: (FullError, f"has no room to grow: free disk space or quota, or {ELSEWHERE}"),
    sqlite3.SQLITE_IOERR_SHMSIZE: (FullError, f"has no room to grow: free disk space or quota, or {ELSEWHERE}"),
}


def explain(path: Path, error: sqlite3.Error) -> DatabaseError:
    """The DatabaseError that says what ``error`` means for the file ``path``."""
    code = getattr(error, "sqlite_errorcode", -1)
    kind, words = _EXPLAINED.get(code) or _EXPLAINED.get(code & 0xFF) or (DatabaseError, f"failed: {ELSEWHERE}")
    return kind(f"the database {path} {words} (SQLite: {' '.join(str(error).split())})")
