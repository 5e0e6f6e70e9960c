"""A PostgreSQL server of the tests' own, on loopback; where none is installed, what takes it is skipped."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

PASSWORD = "s3cret-word"


def _binaries():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    there = shutil.which("initdb")
    return found[-1].parent if found else Path(there).parent if there else None


def _as_user(command):
    """PostgreSQL does not run as root."""
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    return [*user, *command]


def _do(*command):
    subprocess.run(_as_user(list(map(str, command))), check=True, capture_output=True, text=True, timeout=120, cwd="/")


class Postgres:
    """url: of the database NAME, as its owner; sql: rows of a statement, past our code."""

    def __init__(self, root, binaries):
        self._binaries, self._data = binaries, root / "data"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        secret = root / "password"
        secret.write_text(PASSWORD)
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            for path in (root, secret):
                os.chown(path, user.pw_uid, user.pw_gid)
        _do(
            binaries / "initdb", "-D", self._data, "-U", "owner", "-A", "scram-sha-256", f"--pwfile={secret}", "-N",
            "-E", "UTF8", "--locale=C",
        )  # fmt: skip
        settings = f"listen_addresses=127.0.0.1 port={self.port} unix_socket_directories={root} fsync=off"
        self._options = " ".join(f"-c {setting}" for setting in settings.split())
        self.start()

    def start(self):
        _do(self._binaries / "pg_ctl", "-D", self._data, "-o", self._options, "-w", "-l", self._data / "log", "start")

    def stop(self):
        _do(self._binaries / "pg_ctl", "-D", self._data, "-m", "immediate", "stop")

    def url(self, name, user="owner", password=PASSWORD, port=None):
        return f"postgresql+psycopg://{user}:{password}@127.0.0.1:{port or self.port}/{name}"

    def sql(self, statement, name="postgres"):
        import psycopg

        where = self.url(name).replace("+psycopg", "")
        with psycopg.connect(where, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="session")
def postgres():
    if (binaries := _binaries()) is None:
        pytest.skip("no PostgreSQL is installed")
    pytest.importorskip("psycopg")
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    try:
        server = Postgres(root, binaries)
        yield server
        server.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def database(postgres, request):
    """The URL of an empty database."""
    name = f"t{abs(hash(request.node.nodeid)) % 10**12}"
    postgres.sql(f"CREATE DATABASE {name}")
    yield postgres.url(name)
    postgres.sql(f"DROP DATABASE {name} WITH (FORCE)")
