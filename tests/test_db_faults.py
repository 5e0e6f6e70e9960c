"""Where the file lies, and what can be wrong with it."""

import os
import resource
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing

import pytest
from database import add, count, execute, make, refusal, unprivileged

from sparsek_tune.db import errors, reader, sqlite
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Config

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


def test_a_pipe_in_place_of_the_file_is_not_waited_for(path):
    os.mkfifo(path)
    kind, message = refusal(path)
    assert kind == "ReadOnlyError" and "is no file" in message and "--storage or SPARSEK_TUNE_CACHE" in message
    assert reader.load(path, "cuda", 90).broken and path.is_fifo()


def test_a_directory_that_may_not_be_entered(shared_dir):
    path = make(shared_dir / "cache.db")
    shared_dir.chmod(0o600)
    try:
        kind, message = unprivileged(lambda: refusal(path))
        assert kind == "ReadOnlyError" and str(path) in message
        assert unprivileged(lambda: reader.load(path, "cuda", 90)).broken
    finally:
        shared_dir.chmod(0o755)


def test_a_file_in_place_of_the_directory(path):
    path.touch()
    kind, message = refusal(path / "cache.db")
    assert kind == "ReadOnlyError"
    assert str(path) in message
    assert "SPARSEK_TUNE_CACHE" in message
    found = reader.load(path / "cache.db", "cuda", 90)
    assert found.entries == () and found.broken and "run` makes it" not in found.reason


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
