"""The process dies before any statement, the power fails in any write: the file is whole, all that was committed is
there, what is served was measured, and doing it again gets to where it would have got."""

import os
import shutil
import signal
import sqlite3
import sys
from concurrent.futures import Future
from contextlib import closing
from itertools import count as numbers
from pathlib import Path

import pytest
from database import DEVICE, FORK, OK, PROBLEM, TEMPLATE, add, count, execute, make, version

from sparsek_tune.db import reader, records, sqlite, transfer
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.files import replacing
from sparsek_tune.kernel_templates.base import Config

sys.path.append(str(Path(__file__).parent / "tune"))
NEW = Config(BLOCK=128, STAGES=3)


def known(store):
    return {m.config: m.id for m in store.measurements(DEVICE, TEMPLATE, PROBLEM)}


def state(path):
    """All that is stored, but for moments and process ids."""
    with Store(path, read_only=True) as store:
        found = transfer.export(store)
    for record in found:
        del record["created_at"], record["run"]["started_at"], record["run"]["finished_at"], record["run"]["pid"]
        for race in record["races"]:
            del race["created_at"]
            race["known"] = len(race["known"])
    return sorted(map(repr, found))


def check(path):
    """The file is whole, and what is served was measured."""
    assert count(path) >= 0 and execute(path, "PRAGMA foreign_key_check") == []
    served = execute(path, "SELECT m.status FROM winner w JOIN measurement m ON m.id = w.measurement_id")
    assert all(status in ("ok", "static") for (status,) in served)


def sizes(path):
    """How many rows every table has, and how runs ended."""
    tables = [name for (name,) in execute(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    return [execute(path, f"SELECT count(*) FROM {t}") for t in tables], execute(path, "SELECT outcome FROM run")


# --- killed before every statement


def mortal(act, at, pipe):
    """Run ``act`` in a process that kills itself before its statement number ``at``, closing included."""
    steps, real = numbers(), sqlite3.connect

    def step(*_):
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    class Connection(sqlite3.Connection):
        def close(self):
            step()
            super().close()

    def connect(*args, **kwargs):
        connection = real(*args, factory=Connection, **kwargs)
        connection.set_trace_callback(step)
        return connection

    sqlite3.connect = connect
    act(pipe.send)
    os._exit(0)


def deaths(act, prepare):
    """Kill ``act`` before its every statement, ``prepare`` called before each; yields what it told until then."""
    for at in numbers():
        prepare()
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=mortal, args=(act, at, theirs))
        process.start()
        theirs.close()
        told = []
        while True:
            try:
                told.append(ours.recv())
            except EOFError:
                break
        process.join()
        if process.exitcode == 0:
            assert at > 4, "there was something to kill"
            return
        assert process.exitcode == -signal.SIGKILL
        yield told


@pytest.fixture(params=["wal", "delete"])
def base(request, tmp_path, monkeypatch):
    """A database with a run and a winner, in either journal mode."""
    monkeypatch.setattr(sqlite, "is_network", lambda path: request.param == "delete")
    return make(tmp_path / "base.db")


def restore(base, path):
    def prepare():
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        if base is not None:
            shutil.copy(base, path)

    return prepare


def record_and_win(path):
    def act(tell):
        with Store(path) as store:
            m = known(store).get(NEW) or store.record(DEVICE, TEMPLATE, PROBLEM, NEW, OK, 1)
            tell(m)
            store.set_winner(m, 0.3, 0.1)
            store.finish_run(1)

    return act


def take(path, found):
    def act(tell):
        with Store(path) as store:
            transfer.add(store, found)

    return act


@pytest.fixture
def others(tmp_path):
    """Records of another database: two measurements, a better winner."""
    with Store(tmp_path / "other.db") as store:
        add(store, Measured("wrong", reason="out: nan"))
        store.set_winner(add(store, config=NEW), 0.4, 0.1)
        return transfer.export(store)


@pytest.mark.parametrize("kind", ["record and win", "import"])
def test_a_call_that_dies_before_any_statement_is_done_whole_or_not_at_all(base, path, others, kind):
    act = record_and_win(path) if kind == "record and win" else take(path, others)
    restore(base, path)()
    before = state(path)
    act(lambda _: None)
    after = state(path)
    assert len(after) > len(before)
    seen = set()
    for told in deaths(act, restore(base, path)):
        check(path)
        with Store(path, read_only=True) as store:
            assert set(told) <= set(known(store).values()), "what was recorded is there"
        found = state(path)
        seen.add(len(found))
        assert len(found) in (len(before), len(after)), "no half of an import"
        act(lambda _: None)
        assert state(path) == after
        check(path)
    assert seen == {len(before), len(after)}, "deaths came before and after the commit"


def test_a_new_file_is_made_whole_or_not_at_all(path):
    for _ in deaths(lambda tell: Store(path), restore(None, path)):
        assert execute(path, "PRAGMA user_version") in ([(0,)], [(reader.SCHEMA_VERSION,)])
        found = reader.load(path, "cuda", 90)
        assert (found.entries, found.broken) == ((), False)
        make(path)
        assert count(path) == 1 and len(reader.load(path, "cuda", 90).entries) == 1


def test_a_migration_is_done_whole_or_not_at_all(base, path):
    newest = reader.SCHEMA_VERSION + 1
    before = state(base)
    with version(newest):
        for _ in deaths(lambda tell: Store(path), restore(base, path)):
            assert execute(path, "PRAGMA integrity_check") == [("ok",)]
            (at,) = execute(path, "PRAGMA user_version")[0]
            tables = {name for (name,) in execute(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
            assert (at, "note" in tables) in ((newest - 1, False), (newest, True))
            assert len(reader.load(path, "cuda", 90).entries) == 1, "it is served meanwhile"
            Store(path)
            assert execute(path, "PRAGMA user_version") == [(newest,)]
            assert execute(path, "SELECT place FROM run") == [("there",)] and count(path) == 1
            assert state(path) == before


def test_an_export_is_there_whole_or_as_it_was(base, tmp_path):
    target = tmp_path / "shared.jsonl"

    def act(tell):
        with Store(base, read_only=True) as store, replacing(target) as file:
            records.write(file, transfer.export(store))

    act(None)
    whole, stored = target.read_text(), base.read_bytes()
    for old in (None, "mine\n"):

        def prepare(old=old):
            target.unlink(missing_ok=True)
            if old is not None:
                target.write_text(old)

        for _ in deaths(act, prepare):
            assert (target.read_text() if target.exists() else None) in (old, whole)
    assert base.read_bytes() == stored
    act(None)
    assert target.read_text() == whole


def test_a_snapshot_is_there_whole_or_not_at_all(base, tmp_path):
    target, stored = tmp_path / "job.db", base.read_bytes()
    for _ in deaths(lambda tell: transfer.freeze(base, target), lambda: target.unlink(missing_ok=True)):
        if target.exists():
            assert count(target) == 1
        else:
            transfer.freeze(base, target)
        assert len(reader.load(target, "cuda", 90).entries) == 1
    assert base.read_bytes() == stored


# --- a whole search


@pytest.fixture
def search(path, monkeypatch):
    """A run of the tuner in this process: two configs, and a race."""
    import faults

    from sparsek_tune.tune import EFFORTS, types
    from sparsek_tune.tune.bench import Bench
    from sparsek_tune.tune.measure import Estimate
    from sparsek_tune.tune.pool import Compiled, CompilePool
    from sparsek_tune.tune.studies import Studies, StudiesError
    from sparsek_tune.tune.tuner import tune

    def nowhere(*_):
        """The studies hold nothing that may not be lost: the statements here are the store's alone."""
        raise StudiesError("no studies")

    template = faults.template(tiles=(32, 64))

    def estimate(config):
        ms = faults.true_ms(config)
        return Estimate(ms, 0.99 * ms, 1.01 * ms, 10)

    done = Future()
    done.set_result(Compiled("ok", ""))
    monkeypatch.setitem(EFFORTS, "tiny", types.Effort(40, 60.0, 0.01, 3, 0.01, 4, 2))
    monkeypatch.setattr(CompilePool, "submit", lambda self, *rest, early=False: done)
    monkeypatch.setattr(CompilePool, "start", lambda self: None)
    monkeypatch.setattr(Studies, "beside", nowhere)
    monkeypatch.setattr(Bench, "start", lambda self: None)
    monkeypatch.setattr(Bench, "verify", lambda self, *rest: None)
    monkeypatch.setattr(Bench, "verify_cases", lambda self, *rest: None)
    monkeypatch.setattr(Bench, "measure", lambda self, spec, config, *rest: estimate(config))
    monkeypatch.setattr(Bench, "race", lambda self, spec, configs, *rest: [estimate(c) for c in configs])
    real = Store.record

    def act(tell):
        def told(self, *arguments):
            measurement = real(self, *arguments)
            tell(measurement)
            return measurement

        Store.record = told
        try:
            with Store(path) as store:
                options = {"templates": {template.name: template}, "factory": faults.FACTORY, "effort": "tiny"}
                return tune([faults.PROBLEM], faults.DEVICE, store, **options)
        finally:
            Store.record = real

    act.measured = lambda: Store(path, read_only=True).measurements(faults.DEVICE, template, faults.PROBLEM)
    return act


def test_a_search_that_dies_before_any_statement_is_gone_on_with(path, search):
    last = None
    for told in deaths(search, restore(None, path)):
        made = path.exists() and execute(path, "PRAGMA user_version") != [(0,)]
        if made:
            check(path)
            assert set(told) <= {m.id for m in search.measured()}, "what was recorded is there"
        now = sizes(path) if made else None
        if now == last and made:  # it died in what came to nothing: as before
            continue
        last = now
        (row,) = search(lambda _: None)
        assert row.config["tile"] == 64 and row.tried == 2
        trials = [m.config for m in search.measured() if m.result.protocol.get("phase") != "race"]
        assert len(trials) == len(set(trials)) == 2, "nothing is measured twice"
        with Store(path, read_only=True) as store:
            (winner,) = store.winners()
        assert Config.from_key(winner.config) == row.config and winner.tuned_ms == row.tuned_ms
        check(path)


# --- the power fails


def test_what_is_recorded_is_on_the_disk(path):
    with closing(sqlite.connect(make(path))) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a commit waits for the disk


def test_a_log_that_was_cut_or_garbled_anywhere_gives_what_was_committed_before(path, tmp_path):
    """As a disk may leave it that did not write in order: the log of a file that others have open."""
    make(path)
    with closing(sqlite3.connect(path)) as reader_, Store(path) as store:
        reader_.execute("SELECT * FROM winner").fetchall()  # as long as it is open the log stays
        sizes, ids = [os.path.getsize(f"{path}-wal")] if os.path.exists(f"{path}-wal") else [0], []
        for i in range(4):
            ids.append(add(store, config=Config(BLOCK=16, i=i), run=1))
            store.set_winner(ids[-1], 0.3, 0.2 - 0.01 * i)
            sizes.append(os.path.getsize(f"{path}-wal"))
        log, data = Path(f"{path}-wal").read_bytes(), path.read_bytes()
    assert sizes[-1] > sizes[0]
    found = set()
    for cut in sorted({0, 31, 32, *range(1000, len(log), 1877), *sizes, len(log) - 1, len(log)}):
        for tail in (b"", b"\0" * 5000, b"\xa5" * 5000):
            copy = tmp_path / "copy.db"
            restore(None, copy)()
            copy.write_bytes(data)
            Path(f"{copy}-wal").write_bytes(log[:cut] + tail)
            with Store(copy) as store:
                kept = [m.id for m in store.measurements(DEVICE, TEMPLATE, PROBLEM)]
            check(copy)
            assert kept == [1, *ids][: len(kept)], "a beginning of what was committed"
            assert len(kept) >= 1 + sum(size <= cut for size in sizes[1:]), "all that was in the log by then"
            found.add(len(kept))
    assert found == {1, 2, 3, 4, 5}
