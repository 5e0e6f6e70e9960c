"""The database: what is stored comes back, and what can go wrong with a file costs neither data nor the process."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from sparsek_tune.db import errors, reader, schema, sqlite
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


# --- what is stored


def test_everything_recorded_comes_back(path):
    with Store(path) as store:
        run = store.start_run("sparsek-tune run")
        first = add(store, run=run)
        failed = Measured("compile", reason="ptxas: too much shared memory", protocol={"arch": 90})
        second = add(store, failed, run, Config(BLOCK=128, STAGES=3))
        found = store.measurements(DEVICE, TEMPLATE, PROBLEM)
    assert [(m.id, m.config, m.result) for m in found] == [
        (first, CONFIG, OK),
        (second, Config(BLOCK=128, STAGES=3), failed),
    ]
    assert all(m.created_at.endswith("+00:00") for m in found)


def test_a_later_run_goes_on_from_the_measurements_of_an_earlier_one(path):
    make(path)
    with Store(path) as store:
        add(store, Measured("wrong", reason="error 0.3"), config=Config(BLOCK=32, STAGES=1))
        found = store.measurements(DEVICE, TEMPLATE, PROBLEM)
    assert [m.result.status for m in found] == ["ok", "wrong"]


def test_problems_that_differ_only_in_fields_the_kernel_ignores_are_one(path):
    make(path)
    other_k = PROBLEM._replace(k=7)
    other_n = PROBLEM._replace(n=1024)
    with Store(path) as store:
        assert len(store.measurements(DEVICE, TEMPLATE, other_k)) == 1
        assert store.measurements(DEVICE, TEMPLATE, other_n) == []
        assert store.winners()[0].problem == PROBLEM._replace(k=0)


@pytest.mark.parametrize("change", [{"driver": "560"}, {"triton": "3.7"}, {"name": "GPU B"}, {"memory": 1 << 40}])
def test_measurements_are_of_one_fingerprint(path, change):
    make(path)
    other = replace(DEVICE, **change)
    with Store(path) as store:
        assert store.measurements(other, TEMPLATE, PROBLEM) == []
        add(store, device=other)
        assert store.summary()[1].device == other


def test_measurements_are_of_one_kernel_source(path, tmp_path):
    make(path)
    source = tmp_path / "kernel.py"
    source.write_text("changed")
    changed = replace(TEMPLATE, sources=(str(source),))
    with Store(path) as store:
        assert store.measurements(DEVICE, changed, PROBLEM) == []
        assert len(store.measurements(DEVICE, TEMPLATE, PROBLEM)) == 1


def test_measurements_can_be_neither_changed_nor_deleted(path):
    make(path)
    for statement in ("UPDATE measurement SET median_ms = 0.001", "DELETE FROM measurement"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            execute(path, statement)
    assert count(path) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"status": "fine"}, "status must be one of ok, .*'fine'"),
        ({"status": "ok"}, "median_ms must be given"),
        ({"status": "ok", "median_ms": float("nan")}, "finite"),
        ({"status": "ok", "median_ms": -1.0}, "above 0"),
        ({"status": "wrong", "median_ms": 1.0}, "median_ms must be None where status is 'wrong'"),
    ],
)
def test_a_result_that_makes_no_sense_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        Measured(**arguments)


def test_the_latest_winner_replaces_the_one_before(path):
    make(path)
    with Store(path) as store:
        assert store.set_winner(add(store, config=Config(BLOCK=128, STAGES=1)), 0.3, 0.1)
        (winner,) = store.winners()
    assert (Config.from_key(winner.config), winner.default_ms, winner.tuned_ms) == (
        Config(BLOCK=128, STAGES=1),
        0.3,
        0.1,
    )


def test_a_static_result_never_replaces_a_measured_winner_but_the_reverse_holds(path):
    with Store(path) as store:
        static = add(store, Measured("static"), config=Config(BLOCK=16, STAGES=1))
        assert store.set_winner(static)
        assert store.winners()[0].static
        assert store.set_winner(add(store), 0.3, 0.2)
        assert not store.set_winner(static)
        (winner,) = store.winners()
    assert not winner.static
    assert winner.config == CONFIG.key


@pytest.mark.parametrize("status", ["wrong", "timeout"])
def test_a_failed_measurement_cannot_win(path, status):
    with Store(path) as store:
        with pytest.raises(ValueError, match=f"ok or static, but is {status}"):
            store.set_winner(add(store, Measured(status)))
        with pytest.raises(ValueError, match="but is missing"):
            store.set_winner(99)
        assert store.winners() == []


def test_the_summary_counts_attempts_by_status_with_and_without_a_winner(path):
    make(path)
    with Store(path) as store:
        add(store, Measured("infeasible", reason="shared memory"))
        add(store, Measured("infeasible", reason="shared memory"))
        add(store, Measured("wrong"), problem=PROBLEM._replace(n=64))
        tuned, untuned = store.summary()
    assert tuned.counts == {"ok": 1, "infeasible": 2}
    assert tuned.winner is not None
    assert (tuned.winner.tuned_ms, tuned.problem, tuned.template) == (0.2, PROBLEM._replace(k=0), "forward")
    assert (untuned.counts, untuned.winner, untuned.problem.n) == ({"wrong": 1}, None, 64)


def test_a_run_says_how_it_ended(path):
    with Store(path) as store:
        done, interrupted, _killed = (store.start_run(c) for c in "abc")
        store.finish_run(done)
        store.finish_run(interrupted, "interrupted")
        with pytest.raises(ValueError, match="done, interrupted, failed, but is 'bored'"):
            store.finish_run(done, "bored")
    rows = execute(path, "SELECT command, outcome, finished_at IS NULL FROM run ORDER BY id")
    assert rows == [("a", "done", 0), ("b", "interrupted", 0), ("c", "running", 1)]


def test_the_reader_sees_what_the_store_wrote(path):
    make(path)
    with Store(path) as store:
        found = reader.load(path, "cuda", 90)
        assert list(found.entries) == store.winners()
    assert (len(found.entries), found.reason, found.broken) == (1, "", False)
    other = reader.load(path, "cuda", 80)
    assert (other.entries, other.broken) == ((), False)
    assert "no winner for cuda:80" in other.reason


# --- the schema


def described(path):
    inspector = inspect(create_engine(f"sqlite:///{path}"))
    tables = {}
    for table in inspector.get_table_names():
        tables[table] = {
            "columns": {
                c["name"]: (str(c["type"]), c["nullable"], c["primary_key"]) for c in inspector.get_columns(table)
            },
            "unique": sorted(u["column_names"] for u in inspector.get_unique_constraints(table)),
            "foreign": sorted(
                (f["constrained_columns"], f["referred_table"], f["referred_columns"])
                for f in inspector.get_foreign_keys(table)
            ),
            "indexes": sorted((i["name"], i["column_names"], i["unique"]) for i in inspector.get_indexes(table)),
            "checks": sorted(c["sqltext"] for c in inspector.get_check_constraints(table)),
        }
    return tables


def test_migrations_and_tables_describe_one_schema(tmp_path):
    Store(tmp_path / "migrated.db")
    schema.Base.metadata.create_all(create_engine(f"sqlite:///{tmp_path / 'declared.db'}"))
    migrated, declared = described(tmp_path / "migrated.db"), described(tmp_path / "declared.db")
    assert len(migrated) == 7
    assert migrated == declared


def test_the_newest_migration_is_the_version_that_the_reader_knows(path):
    Store(path)
    assert max(sqlite.migrations()) == reader.SCHEMA_VERSION == len(sqlite.migrations())
    assert execute(path, "PRAGMA user_version") == [(reader.SCHEMA_VERSION,)]


def test_the_device_table_holds_every_field_of_a_fingerprint():
    assert tuple(Device.__dataclass_fields__) == reader._DEVICE
    assert {c.name for c in schema.DeviceRow.__table__.columns} == {"id", *Device.__dataclass_fields__}


def test_a_migration_that_fails_leaves_no_trace(path, monkeypatch):
    good = sqlite.migrations()
    twice = "CREATE TABLE extra (id);\nCREATE TABLE extra (id);"
    monkeypatch.setattr(sqlite, "migrations", lambda: {1: good[1], 2: twice})
    with pytest.raises(errors.DatabaseError):
        Store(path)
    assert execute(path, "SELECT count(*) FROM sqlite_master") == execute(path, "PRAGMA user_version") == [(0,)]
    monkeypatch.undo()
    make(path)
    assert count(path) == 1


# --- where the file lies


def test_the_default_path_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SPARSEK_TUNE_CACHE", raising=False)
    assert reader.default_path() == tmp_path / ".cache/sparsek-tune/cache.db"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert reader.default_path() == tmp_path / ".cache/sparsek-tune/cache.db"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert reader.default_path() == tmp_path / "xdg/sparsek-tune/cache.db"
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(tmp_path / "mine.db"))
    assert reader.default_path() == tmp_path / "mine.db"
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(tmp_path))
    assert reader.default_path() == tmp_path / "cache.db"
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(tmp_path / "new") + "/")
    with Store() as store:
        assert store.path == tmp_path / "new/cache.db"
    assert store.path.exists()


def test_wal_is_used_on_a_local_disk_and_not_on_a_network_one(tmp_path, monkeypatch):
    def mode(path):
        return execute(path, "PRAGMA journal_mode")[0][0]

    assert mode(make(tmp_path / "local.db")) == "wal"
    monkeypatch.setattr(sqlite, "is_network", lambda path: True)
    assert mode(make(tmp_path / "remote.db")) == "delete"
    assert mode(make(tmp_path / "local.db")) == "delete", "a file that was moved to a network disk leaves WAL"


@pytest.mark.parametrize(
    ("mounts", "network"),
    [
        ("/dev/sda / ext4 rw 0 0\n", False),
        ("srv:/x / nfs4 rw 0 0\n", True),
        ("/dev/sda / ext4 rw 0 0\nsrv:/x {dir} lustre rw 0 0\n", True),
        ("srv:/x / nfs rw 0 0\n/dev/sda {dir} ext4 rw 0 0\n", False),
        ("/dev/sda {dir} ext4 rw 0 0\nsrv:/x {dir} cifs rw 0 0\n", True),
        ("srv:/x {dir}-other nfs rw 0 0\n/dev/sda / xfs rw 0 0\n", False),
        ("host:/x {dir} fuse.sshfs rw 0 0\n", True),
    ],
)
def test_network_file_systems_are_told_from_the_mounts(tmp_path, mounts, network):
    table = tmp_path / "mounts"
    table.write_text(mounts.format(dir=tmp_path))
    assert sqlite.is_network(tmp_path / "cache.db", table) is network


# --- what can be wrong with a file


def assert_left_alone(path, kind, words):
    """Opening raises ``kind``, the reader says the same without raising, and no byte of the file changes."""
    before = path.read_bytes()
    name, message = refusal(path)
    assert name == kind.__name__
    assert str(path) in message
    assert words in message
    assert "SPARSEK_TUNE_CACHE" in message
    found = reader.load(path, "cuda", 90)
    assert (found.entries, found.broken) == ((), True)
    assert str(path) in found.reason
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_left_alone(path):
    path.write_bytes(b"these are the notes that I keep\n" * 100)
    assert_left_alone(path, errors.CorruptError, "not a SQLite database")


def test_a_damaged_database_is_left_alone(path):
    make(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    assert_left_alone(path, errors.CorruptError, "is damaged")


def test_damage_that_no_query_would_meet_is_found_before_anything_is_written(path):
    make(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096] + b"\xff" * 4096)
    with pytest.raises(errors.CorruptError, match="is damaged"):
        Store(path)
    assert path.read_bytes() == whole[:-4096] + b"\xff" * 4096


def test_a_database_that_was_cut_off_is_left_alone(path):
    make(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert_left_alone(path, errors.CorruptError, "is damaged")


def test_a_database_of_another_program_is_left_alone(path):
    execute(path, "CREATE TABLE studies (id)")
    assert_left_alone(path, errors.CorruptError, "belongs to another program")
    execute(path, "PRAGMA user_version = 1")
    assert_left_alone(path, errors.CorruptError, "belongs to another program")


def test_a_newer_database_is_left_alone(path):
    make(path)
    execute(path, f"PRAGMA user_version = {reader.SCHEMA_VERSION + 1}")
    assert_left_alone(path, errors.NewerSchemaError, "upgrade sparsek-tune")


def test_a_database_without_its_tables_is_left_alone(path):
    make(path)
    execute(path, "DROP TABLE winner", "ALTER TABLE config RENAME TO gone")
    before = path.read_bytes()
    found = reader.load(path, "cuda", 90)
    assert (found.entries, found.broken) == ((), True)
    assert refusal(path, Store.winners)[0] == "CorruptError"
    assert path.read_bytes() == before


def test_an_empty_file_becomes_a_database(path):
    path.touch()
    empty = reader.load(path, "cuda", 90)
    assert (empty.entries, empty.broken) == ((), False)
    assert path.read_bytes() == b""
    make(path)
    assert len(reader.load(path, "cuda", 90).entries) == 1


def test_a_missing_file_is_no_fault_and_is_not_made_by_reading(path):
    found = reader.load(path, "cuda", 90)
    assert (found.entries, found.broken) == ((), False)
    assert "sparsek-tune run" in found.reason
    with pytest.raises(errors.MissingError, match="there is no database"):
        Store(path, read_only=True)
    assert not path.exists()


def test_a_directory_in_place_of_the_file(path):
    path.mkdir()
    assert refusal(path)[0] == "ReadOnlyError"
    assert reader.load(path, "cuda", 90).broken


def test_a_file_in_place_of_the_directory(path):
    path.touch()
    kind, message = refusal(path / "cache.db")
    assert kind == "ReadOnlyError"
    assert str(path) in message
    assert "SPARSEK_TUNE_CACHE" in message
    assert reader.load(path / "cache.db", "cuda", 90).entries == ()


def test_a_read_only_file_is_served_but_not_written(shared_dir):
    path = make(shared_dir / "cache.db")
    path.chmod(0o444)
    kind, message = unprivileged(lambda: refusal(path))
    assert kind == "ReadOnlyError", message
    assert str(path) in message
    assert "permissions" in message
    assert len(unprivileged(lambda: reader.load(path, "cuda", 90)).entries) == 1
    assert count(path) == 1


def test_a_read_only_directory_is_served_but_not_written(shared_dir):
    path = make(shared_dir / "cache.db")
    path.chmod(0o444)
    shared_dir.chmod(0o555)
    assert sorted(os.listdir(shared_dir)) == ["cache.db"], "the store leaves no journal behind"
    kind, message = unprivileged(lambda: refusal(path))
    assert kind == "ReadOnlyError", message
    assert unprivileged(lambda: refusal(shared_dir / "new.db"))[0] == "ReadOnlyError"
    assert unprivileged(lambda: refusal(shared_dir / "new" / "cache.db"))[0] == "ReadOnlyError"
    found = unprivileged(lambda: reader.load(path, "cuda", 90))
    assert (len(found.entries), found.broken) == (1, False)
    assert unprivileged(lambda: len(Store(path, read_only=True).winners())) == 1


def test_a_half_written_file_in_a_read_only_directory_is_not_served(shared_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite, "is_network", lambda path: True)
    source, path = make(tmp_path / "cache.db"), shared_dir / "cache.db"
    with closing(sqlite3.connect(source, isolation_level=None)) as writer:
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute(
            "CREATE TABLE big AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c LIMIT 9999)"
            " SELECT x, hex(zeroblob(50)) FROM c"
        )
        writer.execute("UPDATE winner SET tuned_ms = 0.001")
        writer.execute("UPDATE big SET x = x + 1")
        for suffix in ("", "-journal"):
            shutil.copy(f"{source}{suffix}", f"{path}{suffix}")
    shared_dir.chmod(0o555)
    found = unprivileged(lambda: reader.load(path, "cuda", 90))
    assert (found.entries, found.broken) == ((), True)
    shared_dir.chmod(0o777)
    with Store(path) as store:
        assert [w.tuned_ms for w in store.winners()] == [0.2], "the owner's next run rolls the half-written part back"


def test_a_file_that_may_not_be_read_is_a_fault_with_a_reason(shared_dir):
    path = make(shared_dir / "cache.db")
    path.chmod(0o000)
    found = unprivileged(lambda: reader.load(path, "cuda", 90))
    assert (found.entries, found.broken) == ((), True)
    assert "permissions" in found.reason


def test_a_read_only_store_shows_and_refuses_to_write(path):
    make(path)
    with Store(path, read_only=True) as store:
        assert len(store.winners()) == len(store.summary()) == 1
        with pytest.raises(errors.ReadOnlyError):
            store.start_run("test")
    assert count(path) == 1


def test_a_database_that_another_process_holds(path, monkeypatch):
    make(path)
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    with Store(path) as store:
        with closing(sqlite3.connect(path, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            start = time.monotonic()
            with pytest.raises(errors.LockedError, match="held by another process"):
                store.start_run("test")
            assert 0.1 <= time.monotonic() - start < 5
            assert len(reader.load(path, "cuda", 90).entries) == 1, "readers do not wait for a writer"
        assert store.start_run("test")


def test_opening_waits_for_a_reader_that_is_in_the_way_of_the_journal_mode(path, monkeypatch):
    make(path)
    other = sqlite3.connect(path, check_same_thread=False)
    other.execute("SELECT * FROM winner").fetchall()
    monkeypatch.setattr(sqlite, "is_network", lambda path: True)
    timer = threading.Timer(0.3, other.close)
    timer.start()
    make(path)
    timer.join()
    assert execute(path, "PRAGMA journal_mode") == [("delete",)]


def fill_the_disk(path):
    """Records until the process may write no more bytes; says how many records returned, and the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Store(path) as store:
        run = store.start_run("test")
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        done = 0
        try:
            for i in range(10_000):
                add(store, Measured("runtime", reason="x" * 5000), run, Config(BLOCK=16, i=i))
                done += 1
        except errors.DatabaseError as error:
            return done, type(error).__name__, str(error)
    return done, "nothing was raised", ""


def test_a_full_disk_is_reported_and_costs_nothing_that_was_recorded(shared_dir):
    path = make(shared_dir / "cache.db")
    path.chmod(0o666)
    done, kind, message = unprivileged(lambda: fill_the_disk(path))
    assert kind == "FullError", message
    assert "free disk space" in message
    assert str(path) in message
    assert done >= 10
    assert count(path) == done + 1
    assert len(reader.load(path, "cuda", 90).entries) == 1
    with Store(path) as store:
        add(store)
    assert count(path) == done + 2


# --- many processes


def write_many(path, start, name):
    start.wait()
    with Store(path) as store:
        run = store.start_run(name)
        for i in range(50):
            store.set_winner(add(store, run=run, config=Config(BLOCK=16, i=i, by=name)), 0.3, 0.2)


def test_four_processes_that_write_at_once_lose_nothing(path):
    start = FORK.Barrier(4)
    processes = [FORK.Process(target=write_many, args=(path, start, f"writer {i}")) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert count(path) == 200
    with Store(path) as store:
        found = {m.config for m in store.measurements(DEVICE, TEMPLATE, PROBLEM)}
        assert len(store.winners()) == 1
    assert found == {Config(BLOCK=16, i=i, by=f"writer {w}") for i in range(50) for w in range(4)}


def write_until_killed(path, pipe):
    with Store(path) as store:
        run = store.start_run("to be killed")
        while True:
            pipe.send(add(store, run=run))


def test_a_process_killed_while_it_writes_costs_nothing_that_was_recorded(path):
    for _ in range(3):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=write_until_killed, args=(path, theirs))
        process.start()
        told = [ours.recv() for _ in range(10)]
        process.kill()
        process.join()
        theirs.close()
        while ours.poll():
            try:
                told.append(ours.recv())
            except EOFError:
                break
        with Store(path) as store:
            kept = {m.id for m in store.measurements(DEVICE, TEMPLATE, PROBLEM)}
            add(store)
        assert set(told) <= kept
        assert count(path) == len(kept) + 1


def test_a_store_goes_on_in_both_processes_after_a_fork(path):
    with Store(path) as store:
        run = store.start_run("parent")
        add(store, run=run)

        def child():
            for _ in range(20):
                add(store, run=run)

        process = FORK.Process(target=child)
        process.start()
        for _ in range(20):
            add(store, run=run)
        process.join()
        assert process.exitcode == 0
        assert len(store.measurements(DEVICE, TEMPLATE, PROBLEM)) == 41
    assert count(path) == 41


def test_no_connection_outlives_a_call(path):
    with Store(path) as store:
        add(store)
        held = subprocess.run(["ls", "-l", f"/proc/{os.getpid()}/fd"], capture_output=True, text=True).stdout
        assert "->" in held
        assert str(path) not in held


# --- shipped configs


def shipped_document(**change):
    entry = reader.Entry("forward", "0" * 16, DEVICE, PROBLEM, CONFIG.key, 0.3, 0.2, False, "2026-01-01T00:00:00+00:00")
    return {**reader.document([entry]), **change}, entry._replace(shipped=True)


def test_shipped_configs_come_back_as_they_were_written(tmp_path):
    document, entry = shipped_document()
    (tmp_path / "gpu_a.json").write_text(json.dumps(document))
    assert reader.load_shipped("cuda", 90, tmp_path) == reader.Winners((entry,))
    assert reader.load_shipped("cuda", 80, tmp_path) == reader.Winners(())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps(shipped_document(format=2)[0]),
        json.dumps(shipped_document(device={"kind": "cuda"})[0]),
        json.dumps(shipped_document(winners=[{"template": "forward"}])[0]),
    ],
)
def test_one_bad_shipped_file_is_named_and_does_not_take_the_others_along(tmp_path, text):
    document, entry = shipped_document()
    (tmp_path / "a_bad.json").write_text(text)
    (tmp_path / "b_good.json").write_text(json.dumps(document))
    found = reader.load_shipped("cuda", 90, tmp_path)
    assert (found.entries, found.broken) == ((entry,), True)
    assert "a_bad.json" in found.reason


def test_the_package_ships_only_files_that_can_be_read():
    for cc in (80, 86, 89, 90, 100, 120):
        assert reader.load_shipped("cuda", cc).reason == ""


def test_a_document_is_of_one_device():
    _, entry = shipped_document()
    other = entry._replace(device=Device("cuda", 90, "GPU B", 1, 1))
    with pytest.raises(ValueError, match="of one device, but are of 2"):
        reader.document([entry, other])


def test_reading_loads_the_standard_library_only():
    code = "import sys, sparsek_tune.db.reader; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sqlite3" in loaded
    assert not {"sqlalchemy", "optuna", "click", "torch", "triton", "numpy"} & set(loaded)
