"""What is stored, and the schema that holds it."""

import sqlite3
from dataclasses import replace

import pytest
from database import CONFIG, DEVICE, OK, PROBLEM, TEMPLATE, add, count, execute, make
from sqlalchemy import create_engine, inspect

from sparsek_tune.db import errors, reader, schema, sqlite
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Device

# --- what is stored


def test_everything_recorded_comes_back(where):
    with Store(where) as store:
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


def test_a_later_run_goes_on_from_the_measurements_of_an_earlier_one(where):
    make(where)
    with Store(where) as store:
        add(store, Measured("wrong", reason="error 0.3"), config=Config(BLOCK=32, STAGES=1))
        found = store.measurements(DEVICE, TEMPLATE, PROBLEM)
    assert [m.result.status for m in found] == ["ok", "wrong"]


def test_problems_that_differ_only_in_fields_the_kernel_ignores_are_one(where):
    make(where)
    other_k = PROBLEM._replace(k=7)
    other_n = PROBLEM._replace(n=1024)
    with Store(where) as store:
        assert len(store.measurements(DEVICE, TEMPLATE, other_k)) == 1
        assert store.measurements(DEVICE, TEMPLATE, other_n) == []
        assert store.winners()[0].problem == PROBLEM._replace(k=0)


@pytest.mark.parametrize("change", [{"driver": "560"}, {"triton": "3.7"}, {"name": "GPU B"}, {"memory": 1 << 40}])
def test_measurements_are_of_one_fingerprint(where, change):
    make(where)
    other = replace(DEVICE, **change)
    with Store(where) as store:
        assert store.measurements(other, TEMPLATE, PROBLEM) == []
        add(store, device=other)
        assert store.summary()[1].device == other


def test_measurements_are_of_one_kernel_source(where, tmp_path):
    make(where)
    source = tmp_path / "kernel.py"
    source.write_text("changed")
    changed = replace(TEMPLATE, sources=(str(source),))
    with Store(where) as store:
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


def test_the_latest_winner_replaces_the_one_before(where):
    make(where)
    with Store(where) as store:
        assert store.set_winner(add(store, config=Config(BLOCK=128, STAGES=1)), 0.3, 0.1)
        (winner,) = store.winners()
    assert (Config.from_key(winner.config), winner.default_ms, winner.tuned_ms) == (
        Config(BLOCK=128, STAGES=1),
        0.3,
        0.1,
    )


def test_a_static_result_never_replaces_a_measured_winner_but_the_reverse_holds(where):
    with Store(where) as store:
        static = add(store, Measured("static"), config=Config(BLOCK=16, STAGES=1))
        assert store.set_winner(static)
        assert store.winners()[0].static
        assert store.set_winner(add(store), 0.3, 0.2)
        assert not store.set_winner(static)
        (winner,) = store.winners()
    assert not winner.static
    assert winner.config == CONFIG.key


@pytest.mark.parametrize("status", ["wrong", "timeout"])
def test_a_failed_measurement_cannot_win(where, status):
    with Store(where) as store:
        with pytest.raises(ValueError, match=f"ok or static, but is {status}"):
            store.set_winner(add(store, Measured(status)))
        with pytest.raises(ValueError, match="but is missing"):
            store.set_winner(99)
        assert store.winners() == []


def test_the_summary_counts_attempts_by_status_with_and_without_a_winner(where):
    make(where)
    with Store(where) as store:
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
    assert len(migrated) == 8
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


def test_a_measurement_of_no_run_is_refused(path):
    make(path)
    with Store(path) as store:
        before = len(store.measurements(DEVICE, TEMPLATE, PROBLEM))
        with pytest.raises(errors.DatabaseError):
            store.record(DEVICE, TEMPLATE, PROBLEM, CONFIG, OK, 999)
        assert len(store.measurements(DEVICE, TEMPLATE, PROBLEM)) == before


def test_winners_of_another_kind_of_gpu_are_not_read(path):
    make(path)
    assert len(reader.load(path, "cuda", 90).entries) == 1
    assert reader.load(path, "hip", 90).entries == reader.load(path, "hip", None).entries == ()
