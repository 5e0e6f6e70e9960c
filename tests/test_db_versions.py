"""Two versions of the package at one file: neither harms what the other wrote."""

import lzma
from pathlib import Path

import pytest
from database import DEVICE, FORK, PROBLEM, TEMPLATE, add, count, execute, make, refusal, version

from sparsek_tune.db import errors, reader, records, sqlite, transfer
from sparsek_tune.db.schema import ConfigRow
from sparsek_tune.db.store import Store


def test_an_older_version_leaves_a_newer_file_alone(path):
    with version(reader.SCHEMA_VERSION + 1):
        make(path)
    before = path.read_bytes()
    assert refusal(path)[0] == "NewerSchemaError"
    found = reader.load(path, "cuda", 90)
    assert (found.entries, found.broken) == ((), True) and "upgrade sparsek-tune" in found.reason
    assert path.read_bytes() == before
    with version(reader.SCHEMA_VERSION + 1), Store(path) as store:
        assert len(store.winners()) == 1


def test_an_older_version_that_has_the_file_open_stops_when_a_newer_one_migrates_it(path):
    with Store(path) as old:
        measurement = add(old)
        with version(reader.SCHEMA_VERSION + 1), Store(path) as new:
            before = path.read_bytes()
        for act in (
            lambda: add(old, run=1), lambda: old.start_run("old"), lambda: old.finish_run(1), old.winners, old.summary,
            lambda: old.set_winner(measurement), lambda: transfer.add(old, []), lambda: transfer.export(old),
        ):  # fmt: skip
            with pytest.raises(errors.NewerSchemaError, match="upgrade sparsek-tune"):
                act()
        assert path.read_bytes() == before
        with version(reader.SCHEMA_VERSION + 1):
            assert [m.id for m in new.measurements(DEVICE, TEMPLATE, PROBLEM)] == [measurement], (
                "what the older one recorded is kept"
            )
            add(new)
            assert count(path) == 2


def test_a_migration_waits_for_what_an_older_version_is_writing(path):
    make(path)

    def migrate(pipe):  # forked before the lock is taken: it would be taken for the child's own
        pipe.recv()
        with version(reader.SCHEMA_VERSION + 1):
            Store(path)

    ours, theirs = FORK.Pipe()
    newer = FORK.Process(target=migrate, args=(theirs,))
    newer.start()
    with Store(path) as old:
        with old.session(write=True) as session:
            session.add(ConfigRow(key="{}"))
            session.flush()
            ours.send("go")
            newer.join(0.5)
            assert newer.is_alive(), "it waits"
        newer.join(30)
        assert newer.exitcode == 0
        with pytest.raises(errors.NewerSchemaError):
            add(old)
    assert execute(path, "SELECT count(*) FROM config") == [(2,)]


def test_an_older_file_is_brought_up_by_many_at_once(path):
    """All but one find it done."""
    make(path)

    def migrate():
        with version(reader.SCHEMA_VERSION + 1), Store(path) as store:
            add(store)

    processes = [FORK.Process(target=migrate) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 6
    assert count(path) == 7 and execute(path, "SELECT DISTINCT place FROM run ORDER BY place") == [
        ("here",),
        ("there",),
    ]


RELEASED = sorted((Path(__file__).parent / "data").glob("schema-*.db.xz"))


def test_a_file_of_every_schema_is_kept():
    assert [int(file.name[7:11]) for file in RELEASED] == sorted(sqlite.migrations())


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: file.name)
def test_files_of_earlier_versions_stay_readable(file, path):
    """schema-NNNN.db.xz was written by a version of that schema, schema-NNNN.jsonl.xz is what it exported of it."""
    path.write_bytes(lzma.decompress(file.read_bytes()))
    with records.open_text(file.with_name(file.name.replace(".db", ".jsonl"))) as opened:
        wanted = records.read(opened, file.name)
    served = {reader.config_key(r["config"]) for r in wanted if r["winner"]}
    found = reader.load(path, "cuda", 90)
    assert {e.config for e in found.entries} == served and len(served) > 1, found.reason
    with Store(path) as store:
        assert transfer.export(store) == wanted
        assert len(store.winners()) == sum(r["winner"] is not None for r in wanted)
        add(store)
        assert count(path) == len(wanted) + 1
