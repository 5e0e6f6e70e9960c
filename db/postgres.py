"""The same tables on a PostgreSQL server, for many hosts at once: in a schema of their own, beside whatever else is in
the database, such as Optuna's tables."""

from __future__ import annotations

from sqlalchemy import URL, Connection, create_engine, exc, make_url
from sqlalchemy.pool import NullPool

from sparsek_tune.db.errors import (
    CorruptError,
    DatabaseError,
    FullError,
    LockedError,
    LostError,
    MissingError,
    NewerSchemaError,
    ReadOnlyError,
)
from sparsek_tune.db.reader import APPLICATION_ID, BUSY_SECONDS, SCHEMA_VERSION
from sparsek_tune.db.schema import Base
from sparsek_tune.db.sqlite import MIGRATIONS, migrations_of

SCHEMA = "sparsek_tune"
_CONNECT_SECONDS = 10
_TRIGGERS = f"""
CREATE FUNCTION {SCHEMA}.refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'measurements and races are append-only'; END $$;
CREATE TRIGGER measurement_is_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON {SCHEMA}.measurement
    FOR EACH STATEMENT EXECUTE FUNCTION {SCHEMA}.refuse();
CREATE TRIGGER race_is_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON {SCHEMA}.race
    FOR EACH STATEMENT EXECUTE FUNCTION {SCHEMA}.refuse();
"""
# By SQLSTATE, or the class that its first two characters name.
_EXPLAINED: dict[str, tuple[type[DatabaseError], str]] = {
    "08": (LostError, "has lost the connection: what was committed is kept; start again"),
    "22": (DatabaseError, "cannot hold a value"),
    "23": (DatabaseError, "refused the row"),
    "25006": (ReadOnlyError, "may only be read"),
    "42501": (ReadOnlyError, "does not allow this user to do that: grant it, or name another user"),
    "42P01": (CorruptError, "does not hold the tables it should: name another database"),
    "53": (FullError, "has run out of what it needs: free disk space or connections of the server"),
    "55P03": (LockedError, "is held by another process: wait for it to end, then start again"),
    "57": (LostError, "has ended the connection: what was committed is kept; start again"),
    "57014": (LockedError, "took longer than the server allows, and nothing was written: see its statement_timeout"),
    "P0001": (DatabaseError, "refused the change"),
}


def parse(url: str) -> URL:
    """Raises DatabaseError unless ``url`` is postgresql+psycopg://USER@HOST/DATABASE."""
    try:
        found = make_url(url)
    except (exc.ArgumentError, ValueError):  # ValueError: of a port that is no number; neither is to be shown
        raise DatabaseError("the storage is no URL: write postgresql+psycopg://USER@HOST/DATABASE") from None
    if found.drivername != "postgresql+psycopg":
        raise DatabaseError(
            f"the storage must be a file or postgresql+psycopg://USER@HOST/DATABASE, but is {found.drivername}://..."
        )
    if "@" in (found.host or ""):  # the rest of a password would be shown as the host
        raise DatabaseError("the storage has more than one @: write %40 for one in the password")
    if shown := sorted(name for name in found.query if "password" in name.lower()):  # it would not be hidden there
        raise DatabaseError(
            f"the storage must not have a password after the ?, but has {', '.join(shown)}: write "
            "USER:PASSWORD@HOST, or set PGPASSWORD, or keep it in ~/.pgpass"
        )
    return found


class Server:
    """The backend of a Store for a URL (see ``sqlite.File``). ``name`` has no password in it, ``where`` may."""

    def __init__(self, url: str, read_only: bool) -> None:
        self.where, parsed = url, parse(url)
        self.name = parsed.render_as_string(hide_password=True)
        try:
            engine = create_engine(
                parsed, poolclass=NullPool, connect_args={"connect_timeout": _CONNECT_SECONDS}, hide_parameters=True
            )
        except ModuleNotFoundError as error:
            raise DatabaseError(f"{self.name} needs psycopg: pip install 'sparsek-tune[postgres]'") from error
        self.write = engine.execution_options(schema_translate_map={None: SCHEMA})
        self.read = self.write.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        try:
            with self.read.begin() as connection:
                version = self._version(connection)
            if version < SCHEMA_VERSION and not read_only:
                self._prepare()
            elif version == 0:
                raise MissingError(f"{self.name} holds no tables of ours yet: `sparsek-tune run --storage` makes them")
            elif version < SCHEMA_VERSION:
                raise DatabaseError(
                    f"the database {self.name} has schema {version}, older than this version's {SCHEMA_VERSION}: a "
                    "command that writes, such as `sparsek-tune run --storage`, brings it up to date"
                )
        except exc.DBAPIError as error:
            raise self.explain(error) from error

    def begin(self, connection: Connection, write: bool) -> None:
        """What a transaction begins with. One writes at a time, as on SQLite: so a row that is looked for and not found
        may be added."""
        if write:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS:.0f}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({APPLICATION_ID})")
        self._version(connection)

    def close(self) -> None:
        self.write.dispose()

    def explain(self, error: exc.DBAPIError) -> DatabaseError:
        """The DatabaseError that says what ``error`` means."""
        code = getattr(error.orig, "sqlstate", None)
        said = (str(error.orig).strip() or repr(error.orig)).splitlines()[0]
        if code is None and isinstance(error, exc.DataError):  # the driver's own refusal
            code = "22"
        if code is None:
            kind, words = LostError, "cannot be reached: mend the URL, the password or the server"
        else:
            kind, words = _EXPLAINED.get(code) or _EXPLAINED.get(code[:2]) or (DatabaseError, "failed")
        return kind(f"the database {self.name} {words} (PostgreSQL: {said})")

    def _prepare(self) -> None:
        """Make the tables, or bring them up to date, unless another process was faster."""
        with self.write.begin() as connection:
            self.begin(connection, write=True)
            version = self._version(connection)
            if version == 0:
                connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                Base.metadata.create_all(connection, checkfirst=False)
                connection.exec_driver_sql(_TRIGGERS)
                connection.exec_driver_sql(f"CREATE TABLE {SCHEMA}.schema_version (version integer NOT NULL)")
                connection.exec_driver_sql(f"INSERT INTO {SCHEMA}.schema_version VALUES ({SCHEMA_VERSION})")
            elif version < SCHEMA_VERSION:
                migrations = migrations_of(MIGRATIONS / "postgresql")
                connection.exec_driver_sql(f"SET LOCAL search_path TO {SCHEMA}")
                for number in range(version + 1, SCHEMA_VERSION + 1):
                    connection.exec_driver_sql(migrations[number])
                connection.exec_driver_sql(f"UPDATE schema_version SET version = {SCHEMA_VERSION}")

    def _version(self, connection: Connection) -> int:
        """Of the schema; 0 where there is none. Raises NewerSchemaError."""
        table = f"{SCHEMA}.schema_version"
        if connection.exec_driver_sql(f"SELECT to_regclass('{table}')").scalar() is None:
            return 0
        version = connection.exec_driver_sql(f"SELECT max(version) FROM {table}").scalar() or 0
        if version > SCHEMA_VERSION:
            raise NewerSchemaError(
                f"the database {self.name} has schema {version}, but this version of sparsek-tune knows up to "
                f"{SCHEMA_VERSION}: upgrade sparsek-tune or name another database"
            )
        return version
