"""What the tests of the database share: one of everything that it stores, and ways to get at the file."""

import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import traceback
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sparsek_tune.db import errors, reader, sqlite
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Choice, Config, Cost, Param, Pow2, Template
from sparsek_tune.problem import Device, Problem

NOBODY = 65534
FORK = multiprocessing.get_context("fork")
DEVICE = Device("cuda", 90, "GPU A", 132, 232448, 50 << 20, 80 << 30, "550.1", "12.8", "3.6.0", "2.13.0")
PROBLEM = Problem.of("bf16", 128, 4, "kv", 1024, 512, 16000, 8)
TEMPLATE = Template(
    name="forward",
    fields=frozenset(Problem._fields) - {"k"},
    space=(Param("BLOCK", Pow2(16, 128)), Param("STAGES", Choice((1, 2, 3)))),
    default=lambda problem, device: Config(BLOCK=16, STAGES=1),
    check=lambda config, problem, device: None,
    cost=lambda config, problem: Cost(1.0, 1.0),
    sources=(__file__,),
)
CONFIG = Config(BLOCK=64, STAGES=2)
OK = Measured("ok", 0.2, 0.19, 0.21, 50, protocol={"l2": "cold", "rounds": 3})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.db"


@pytest.fixture
def cache(path, monkeypatch):
    """The database file that commands take; not made yet."""
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(path))
    return path


@pytest.fixture
def shared_dir():
    """A directory that any user can reach (pytest's own is closed to others)."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    directory.chmod(0o777)
    shutil.rmtree(directory)


def add(store, result=OK, run=None, config=CONFIG, problem=PROBLEM, device=DEVICE, template=TEMPLATE):
    return store.record(device, template, problem, config, result, run or store.start_run("test"))


def make(path, winner=True):
    with Store(path) as store:
        measurement = add(store)
        if winner:
            store.set_winner(measurement, 0.3, 0.2)
    return path


def write_many(where, number, started):
    """For processes of their own, which find this module however pytest was started. started: a queue for their ids."""
    with Store(where) as store:
        started.put(os.getpid())
        run = store.start_run("many")
        for n in range(number):
            add(store, run=run, problem=PROBLEM._replace(n=16 << (n % 8)))


def execute(path, *statements):
    """The rows of the last statement, by a connection of our own."""
    with closing(sqlite3.connect(path)) as connection, connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def count(path):
    assert execute(path, "PRAGMA integrity_check") == [("ok",)]
    return execute(path, "SELECT count(*) FROM measurement")[0][0]


def unprivileged(function):
    """``function()`` in a child that file permissions hold for, whoever runs the tests."""

    def child(pipe):
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            pipe.send(function())
        except BaseException:
            pipe.send(traceback.format_exc())

    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(30), "the child said nothing"
    answer = ours.recv()
    process.join()
    return answer


def refusal(path, act=None):
    """The class name and message of the DatabaseError that opening (or ``act(store)``) raises."""
    try:
        with Store(path) as store:
            (act or add)(store)
    except errors.DatabaseError as error:
        return type(error).__name__, str(error)
    return "nothing was raised", ""


NEXT = """
CREATE TABLE note (id INTEGER NOT NULL PRIMARY KEY, text TEXT NOT NULL);
INSERT INTO note (text) SELECT reason FROM measurement;
ALTER TABLE run ADD COLUMN place TEXT NOT NULL DEFAULT 'here';
UPDATE run SET place = 'there';
"""


@contextmanager
def version(number):
    """This package as it was at schema ``number``, or, where that is the next, as it may become."""
    patch, scripts = pytest.MonkeyPatch(), {**sqlite.migrations(), reader.SCHEMA_VERSION + 1: NEXT}
    patch.setattr(sqlite, "migrations", lambda: {n: s for n, s in scripts.items() if n <= number})
    patch.setattr(reader, "SCHEMA_VERSION", number)
    try:
        yield
    finally:
        patch.undo()
