"""Opens the SQLite file for writing: safe journal mode, migrations, and a refusal of every file that is not ours."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, create_engine, event, exc
from sqlalchemy.pool import NullPool

from sparsek_tune.db import reader
from sparsek_tune.db.errors import ELSEWHERE, CorruptError, DatabaseError, ReadOnlyError, explain
from sparsek_tune.db.reader import BUSY_SECONDS, schema_version

MIGRATIONS = Path(__file__).parent / "migrations"
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|lustre|ceph|gpfs|beegfs|afs|9p|glusterfs|fuse\.(sshfs|glusterfs|ceph\S*|juicefs)"
)


class File:
    """The backend of a Store for a file: engines for transactions that ``read`` and ``write``, what each begins with,
    what errors mean. ``where`` it is, and a ``name`` of that for messages."""

    def __init__(self, path: Path, read_only: bool) -> None:
        self.name = self.where = path
        if read_only:
            reader.connect(path).close()
        else:
            prepare(path)
        opener = connect_read_only if read_only else connect
        engine = create_engine("sqlite://", creator=lambda: opener(path), poolclass=NullPool)
        event.listen(engine, "begin", _begin)
        self.read, self.write = engine, engine.execution_options(sparsek_begin="IMMEDIATE")

    def begin(self, connection: Connection, write: bool) -> None:
        """Another process, of a newer version, may have migrated the file since; from here on it has to wait."""
        schema_version(connection.connection.driver_connection, self.name)

    def close(self) -> None:
        self.read.dispose()

    def explain(self, error: exc.DBAPIError) -> DatabaseError:
        """The DatabaseError that says what ``error`` means."""
        assert isinstance(error.orig, sqlite3.Error)
        return explain(self.name, error.orig)


def _begin(connection: Connection) -> None:
    # IMMEDIATE for writes: a transaction that starts as a reader may be refused the upgrade, without any waiting.
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sparsek_begin', 'DEFERRED')}")


def connect(path: Path) -> sqlite3.Connection:
    """A connection that may write. It leaves transactions to the caller (no implicit BEGIN). Raises sqlite3.Error."""
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # what a call recorded is on the disk when it returns
    except BaseException:
        connection.close()
        raise
    return connection


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A read-only connection that shows today's tables: an older file stays as it is, a copy in memory is brought up.

    Raises DatabaseError, sqlite3.Error.
    """
    connection = reader.connect(path)
    try:
        if schema_version(connection, path) == reader.SCHEMA_VERSION:
            return connection
        copy = sqlite3.connect(":memory:", isolation_level=None)
        try:
            connection.backup(copy)
            _migrate(copy, path)
            copy.execute("PRAGMA query_only = ON")
        except BaseException:
            copy.close()
            raise
    except BaseException:
        connection.close()
        raise
    connection.close()
    return copy


def prepare(path: Path) -> None:
    """Make the file ``path`` where it is missing, and bring its schema up to date. Raises DatabaseError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReadOnlyError(f"the directory {path.parent} cannot be made ({error.strerror}): {ELSEWHERE}") from error
    if reader.is_there(path):
        with contextlib.suppress(OSError):  # SQLite will say what is wrong
            if not path.stat().st_mode & 0o222:  # root could write it all the same
                raise ReadOnlyError(f"the database {path} may only be read: mend the permissions or {ELSEWHERE}")
    try:
        connection = connect(path)
        try:
            schema_version(connection, path)  # before anything is written
            _check(connection, path)
            _set_journal(connection, "delete" if is_network(path) else "wal")
            _migrate(connection, path)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise explain(path, error) from error


def is_network(path: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether ``path`` lies on a network file system, where WAL's shared memory would not be shared."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return False
    target = path.absolute().parent.resolve()
    found = [(m[1].replace("\\040", " "), m[2]) for m in lines if len(m) > 2]
    inside = [(len(point), kind) for point, kind in found if target.is_relative_to(point)]
    # Of mounts on one point the last is the visible one; max() keeps the first of equals, so look from the end.
    kind = max(reversed(inside), key=lambda m: m[0], default=(0, ""))[1]
    return _NETWORK.fullmatch(kind) is not None


def migrations() -> dict[int, str]:
    """Schema version to the SQL that leads to it."""
    return migrations_of(MIGRATIONS)


def migrations_of(folder: Path) -> dict[int, str]:
    return {int(file.name[:4]): file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.sql"))}


def _check(connection: sqlite3.Connection, path: Path) -> None:
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise CorruptError(
            f"the database {path} is damaged: move it away, restore a copy, or {ELSEWHERE} (SQLite: {verdict})"
        )


def _set_journal(connection: sqlite3.Connection, mode: str) -> None:
    """The switch does not heed the busy timeout, so try it again while another process is in the way."""
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != mode:
        try:
            connection.execute(f"PRAGMA journal_mode = {mode}")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = schema_version(connection, path)  # again: another process may have been faster
        for number, script in migrations().items():
            if number > version:
                for statement in _statements(script):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _statements(script: str) -> Iterator[str]:
    """The statements of ``script`` one by one: ``executescript`` would commit the transaction first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
