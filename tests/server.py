"""A PostgreSQL server of the tests' own, on loopback; where none is installed, what takes it is skipped, or fails if
REQUIRED is set."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PASSWORD = "s3cret-word"
REQUIRED = "SPARSEK_TUNE_REQUIRE_POSTGRES"


def _binaries():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    there = shutil.which("initdb")
    return found[-1].parent if found else Path(there).parent if there else None


def _as_user(*command, dies_with_us=False):
    """PostgreSQL does not run as root."""
    user = ["--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    death = ["--pdeathsig=INT"] if dies_with_us else []
    return [*(["setpriv", *user, *death] if user or death else []), *map(str, command)]


def _do(*command):
    subprocess.run(_as_user(*command), check=True, capture_output=True, text=True, timeout=120, cwd="/")


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
        self._options = [word for setting in settings.split() for word in ("-c", setting)]
        self._log = root / "log"
        self.start()

    def start(self):
        """As a child that ends with this process, however that ends."""
        import psycopg

        command = _as_user(self._binaries / "postgres", "-D", self._data, *self._options, dies_with_us=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        end = time.monotonic() + 60
        while True:
            try:
                return self.sql("SELECT 1")
            except psycopg.OperationalError:
                assert self._process.poll() is None and time.monotonic() < end, self._log.read_text()
                time.sleep(0.05)

    def stop(self):
        """At once, as a crash would."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(60)

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
    binaries = _binaries()
    if binaries is None or importlib.util.find_spec("psycopg") is None:
        missing = pytest.fail if os.environ.get(REQUIRED) else pytest.skip
        missing("no PostgreSQL is installed" if binaries is None else "psycopg is not installed")
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


@pytest.fixture(params=["file", "server"])
def where(request):
    """A database that is not made yet, of either kind: what a Store takes."""
    return request.getfixturevalue("path" if request.param == "file" else "database")
