"""The store on a server: what a file does, and what only a server can do to it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
from click.testing import CliRunner
from database import CONFIG, DEVICE, OK, PROBLEM, TEMPLATE, add, refusal, write_many
from server import PASSWORD

from sparsek_tune import dispatch
from sparsek_tune.cli import main
from sparsek_tune.db import errors, reader, transfer
from sparsek_tune.db import postgres as postgres_module
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import target_device

SPAWN = get_context("spawn")


def name_of(url):
    return url.rpartition("/")[2]


def sparsek(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_everything_recorded_comes_back(database):
    failed = Measured("compile", reason="ptxas: \0 too much shared memory", protocol={"arch": 90, "said": "\0"})
    with Store(database) as store:
        run = store.start_run("sparsek-tune run")
        first, second = add(store, run=run), add(store, failed, run, Config(BLOCK=128, STAGES=3))
        assert store.set_winner(first, 0.3, 0.2)
        store.finish_run(run)
    with Store(database, read_only=True) as store:
        found = store.measurements(DEVICE, TEMPLATE, PROBLEM)
        assert [(m.id, m.config, m.result.status) for m in found] == [
            (first, CONFIG, "ok"), (second, Config(BLOCK=128, STAGES=3), "compile"),
        ]  # fmt: skip
        assert found[0].result == OK and found[1].result.protocol == failed.protocol
        assert found[1].result.reason == "ptxas: \N{REPLACEMENT CHARACTER} too much shared memory"
        (winner,) = store.winners()
        assert (winner.config, winner.device, winner.default_ms) == (CONFIG.key, DEVICE, 0.3)
        (summary,) = store.summary()
        assert summary.counts == {"ok": 1, "compile": 1} and summary.winner == winner


def test_what_a_file_holds_goes_to_a_server_and_back_unchanged(database, path):
    with Store(path) as file, Store(database) as server:
        file.set_winner(add(file), 0.3, 0.2)
        add(file, Measured("timeout", reason="1 s"), config=Config(BLOCK=16, STAGES=1))
        records = transfer.export(file)
        assert transfer.add(server, records).added == 2
        assert transfer.add(server, records) == transfer.Report(0, 2, 0, ())
        assert transfer.export(server) == records
        snapshot = path.with_name("job.db")
        transfer.snapshot(server, snapshot)
        assert Store(snapshot, read_only=True).winners() == file.winners()
    assert dispatch.resolve(PROBLEM, DEVICE, snapshot, templates={"forward": TEMPLATE})["forward"].grade == "exact"


def test_measurements_cannot_be_changed(database, postgres):
    with Store(database) as store:
        add(store)
    for statement in ("UPDATE {} SET median_ms = 0.1", "DELETE FROM {}", "TRUNCATE {} CASCADE"):
        with pytest.raises(Exception, match="append-only"):
            postgres.sql(statement.format("sparsek_tune.measurement"), name_of(database))


def test_no_password_shows(database, postgres, monkeypatch):
    with Store(database) as store:
        run = store.start_run(f"sparsek-tune run --storage {database} --effort quick")
        add(store, run=run)
        assert PASSWORD not in str(store.path)
        (record,) = transfer.export(store)
    assert PASSWORD not in json.dumps(record)
    assert record["run"]["command"].startswith("sparsek-tune run --storage postgresql+psycopg://owner:***@127.0.0.1:")
    shown = sparsek("show", "--storage", database, "--json")
    assert shown.exit_code == 0 and PASSWORD not in shown.output and name_of(database) in shown.output
    for url in (postgres.url("no_such"), postgres.url(name_of(database), "stranger"), postgres.url("x", port=1)):
        result = sparsek("show", "--storage", url)
        assert result.exit_code == 4 and PASSWORD not in result.output and "127.0.0.1" in result.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"port": 1}, "cannot be reached"),
        ({"password": "wrong"}, "cannot be reached.*password"),
        ({"name": "no_such"}, "cannot be reached.*no_such"),
    ],
)
def test_a_server_that_is_not_to_be_had_is_said_to_be(postgres, change, words):
    with pytest.raises(errors.DatabaseError, match=words):
        Store(postgres.url(**{"name": "postgres", **change}))


@pytest.mark.parametrize("storage", ["sqlite:///x.db", "postgresql://h/x", "mysql://h/x"])
def test_other_urls_are_refused_by_name(storage):
    with pytest.raises(errors.DatabaseError, match=r"must be a file or postgresql\+psycopg"):
        Store(storage)
    result = sparsek("show", "--storage", storage)
    assert result.exit_code == 2 and "postgresql+psycopg://" in result.output


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"postgresql+psycopg://owner@127.0.0.1/x?password={PASSWORD}", "no.? .*password after the .*PGPASSWORD"),
        (f"postgresql+psycopg://owner@127.0.0.1/x?sslpassword={PASSWORD}", "has sslpassword"),
        (f"postgresql+psycopg://owner:a@{PASSWORD}@127.0.0.1/x", "more than one @: write %40"),
        (f"postgresql+psycopg://owner:{PASSWORD}@127.0.0.1:port/x", "is no URL"),
    ],
)
def test_a_url_that_would_show_a_password_is_refused_without_it(url, words):
    result = sparsek("run", "--storage", url, "--target", "cuda:90")
    assert result.exit_code == 4 and re.search(words, result.output) and PASSWORD not in result.output


def test_programs_are_told_to_read_a_snapshot(monkeypatch, database):
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", database)
    found = reader.load(None, "cuda", 90)
    assert found.broken and "freeze" in found.reason and PASSWORD not in found.reason


def test_looking_at_an_empty_database_makes_nothing(database, postgres):
    with pytest.raises(errors.MissingError):
        Store(database, read_only=True)
    assert postgres.sql("SELECT to_regclass('sparsek_tune.run')", name_of(database)) == [(None,)]


def test_a_newer_schema_is_refused(database, monkeypatch):
    Store(database)
    with Store(database) as old:
        monkeypatch.setattr(postgres_module, "SCHEMA_VERSION", 0)
        with pytest.raises(errors.NewerSchemaError, match="upgrade"):
            Store(database)
        with pytest.raises(errors.NewerSchemaError, match="upgrade"):  # also one that was open already
            old.winners()


def described(postgres, database):
    """Columns, indexes, constraints and triggers."""
    return [
        sorted(postgres.sql(statement, name_of(database)))
        for statement in (
            "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
            "WHERE table_schema = 'sparsek_tune'",
            "SELECT indexdef FROM pg_indexes WHERE schemaname = 'sparsek_tune'",
            "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE connamespace = 'sparsek_tune'::regnamespace",
            "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
        )
    ]


def write_at_once(database, processes, count):
    """Each of ``processes`` records ``count`` measurements, and ends well."""
    started = SPAWN.Queue()
    writers = [SPAWN.Process(target=write_many, args=(database, count, started)) for _ in range(processes)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0


def test_an_older_schema_is_brought_up_to_date_by_who_writes(database, postgres):
    """As version 1 left it."""
    name = name_of(database)
    with Store(database) as store:
        run = store.start_run("one")
        store.set_winner(add(store, run=run), 0.3, 0.2)
        store.set_winner(add(store, config=Config(BLOCK=16, STAGES=1), run=run), 0.3, 0.25)
        before, served, shape = transfer.export(store), store.winners(), described(postgres, database)
    for statement in ("DROP TABLE sparsek_tune.race", "UPDATE sparsek_tune.schema_version SET version = 1"):
        postgres.sql(statement, name)
    with pytest.raises(errors.DatabaseError, match=r"has schema 1, older than .* brings it up to date"):
        Store(database, read_only=True)
    write_at_once(database, 3, 1)
    assert described(postgres, database) == shape
    with Store(database, read_only=True) as store:
        after = transfer.export(store)
        assert store.winners() == served
    assert len(after) == len(before) + 3 and [bool(r["races"]) for r in after[:2]] == [False, True]
    assert after[1]["races"][0]["known"] == before[1]["races"][0]["known"]
    assert after[1]["races"][0]["created_at"] == before[1]["created_at"]


def test_races_cannot_be_changed(database, postgres):
    with Store(database) as store:
        store.set_winner(add(store), 0.3, 0.2)
    for statement in ("UPDATE {} SET tuned_ms = 0.1", "DELETE FROM {}", "TRUNCATE {}"):
        with pytest.raises(Exception, match="append-only"):
            postgres.sql(statement.format("sparsek_tune.race"), name_of(database))


def test_a_user_that_may_only_read_reads(database, postgres):
    with Store(database) as store:
        add(store)
    name = name_of(database)
    for statement in (
        "DROP ROLE IF EXISTS guest",
        f"CREATE ROLE guest LOGIN PASSWORD '{PASSWORD}'",
        "GRANT USAGE ON SCHEMA sparsek_tune TO guest",
        "GRANT SELECT ON ALL TABLES IN SCHEMA sparsek_tune TO guest",
    ):
        postgres.sql(statement, name)
    guest = postgres.url(name, "guest")
    try:
        with Store(guest, read_only=True) as store:
            assert len(store.measurements(DEVICE, TEMPLATE, PROBLEM)) == 1
        assert refusal(guest)[0] == "ReadOnlyError"
    finally:
        postgres.sql("DROP OWNED BY guest", name)
        postgres.sql("DROP ROLE guest")


def test_processes_that_begin_at_once_make_one_schema_and_lose_nothing(database, postgres):
    write_at_once(database, 4, 25)
    name = name_of(database)
    assert postgres.sql("SELECT count(*) FROM sparsek_tune.measurement", name) == [(100,)]
    assert postgres.sql("SELECT count(*) FROM sparsek_tune.problem", name) == [(8,)]
    assert postgres.sql("SELECT version FROM sparsek_tune.schema_version", name) == [(reader.SCHEMA_VERSION,)]


def test_a_writer_that_is_killed_loses_what_it_had_not_committed_alone(database, postgres):
    Store(database)
    started = SPAWN.Queue()
    writers = [SPAWN.Process(target=write_many, args=(database, 10**6, started)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for _ in writers:
        started.get(timeout=60)
    name = name_of(database)

    def count():
        return postgres.sql("SELECT count(*) FROM sparsek_tune.measurement", name)[0][0]

    while count() < 20:
        time.sleep(0.05)
    before = count()
    os.kill(writers[0].pid, signal.SIGKILL)
    while count() < before + 20:  # the other one goes on, past whatever lock the dead one held
        time.sleep(0.05)
    writers[1].kill()
    for writer in writers:
        writer.join()
    time.sleep(0.2)
    total = count()
    with Store(database) as store:
        add(store)
    assert count() == total + 1


def test_who_waits_too_long_for_the_lock_says_so(database, postgres, monkeypatch):
    monkeypatch.setattr(postgres_module, "BUSY_SECONDS", 1.0)
    with Store(database) as one, Store(database) as two, one.session(write=True):
        start = time.monotonic()
        with pytest.raises(errors.LockedError, match="held by another process"):
            two.start_run("x")
        assert 0.8 < time.monotonic() - start < 10
        two.winners()  # readers do not wait


def test_a_server_that_dies_ends_the_call_and_what_was_committed_is_there_again(database, postgres):
    with Store(database) as store:
        add(store)
        postgres.stop()
        try:
            assert "cannot be reached" in refusal(database)[1]
            with pytest.raises(errors.DatabaseError, match="cannot be reached"):
                add(store, run=1)
        finally:
            postgres.start()
        assert len(store.measurements(DEVICE, TEMPLATE, PROBLEM)) == 1


def test_psycopg_that_is_missing_is_named(database):
    code = f"import sys; sys.modules['psycopg'] = None\nfrom sparsek_tune.db.store import Store\nStore({database!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = found.stderr.splitlines()[-1]
    assert "pip install 'sparsek-tune[postgres]'" in last and PASSWORD not in last


def broken_once(postgres, monkeypatch, times=1):
    """The server ends a connection in the middle of each of the next transactions; the list of what was asked then."""
    begin, seen = postgres_module.Server.begin, []

    def end(self, connection, write):
        begin(self, connection, write)
        if len(seen) < times:
            seen.append(write)
            postgres.sql(
                f"SELECT pg_terminate_backend({connection.exec_driver_sql('SELECT pg_backend_pid()').scalar()}, 9999)"
            )

    monkeypatch.setattr(postgres_module.Server, "begin", end)
    return seen


QUESTIONS = {
    "measurements": lambda store: len(store.measurements(DEVICE, TEMPLATE, PROBLEM)),
    "winners": lambda store: len(store.winners()),
    "summary": lambda store: len(store.summary()),
    "export": lambda store: len(transfer.export(store)),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_a_reader_that_loses_the_connection_asks_once_more(database, postgres, monkeypatch, question):
    with Store(database) as store:
        store.set_winner(add(store), 0.3, 0.2)
        with monkeypatch.context() as patch:
            seen = broken_once(postgres, patch)
            assert question(store) == 1 and seen == [False]
        seen = broken_once(postgres, monkeypatch, times=9)
        with pytest.raises(errors.LostError, match="ended the connection"):
            question(store)
        assert seen == [False, False]


def test_a_writer_that_loses_the_connection_says_so_and_writes_nothing(database, postgres, monkeypatch):
    with Store(database) as store:
        run = store.start_run("x")
        seen = broken_once(postgres, monkeypatch)
        with pytest.raises(errors.LostError, match="ended the connection"):
            add(store, run=run)
        assert seen == [True]
        assert transfer.export(store) == []
        add(store, run=run)
        assert len(transfer.export(store)) == 1, "the next call connects anew"


def test_a_command_whose_connection_is_lost_while_it_writes_ends_with_4(database, path, postgres, monkeypatch):
    with Store(path) as file:
        add(file)
    Store(database)
    broken_once(postgres, monkeypatch)
    result = sparsek("merge", path, "--storage", database)
    assert result.exit_code == 4 and "ended the connection" in result.output and PASSWORD not in result.output
    assert postgres.sql("SELECT count(*) FROM sparsek_tune.measurement", name_of(database)) == [(0,)]


def test_a_statement_that_the_server_ends_is_no_lost_connection(database, postgres):
    with Store(database) as store:
        postgres.sql(f"ALTER DATABASE {name_of(database)} SET statement_timeout = '200ms'")
        with pytest.raises(errors.LockedError, match="statement_timeout"), store.session() as session:
            session.connection().exec_driver_sql("SELECT pg_sleep(5)")


def test_records_that_a_server_cannot_hold_as_they_are(database, path):
    with Store(path) as file:
        add(file)
        (record,) = transfer.export(file)
    failed = {"status": "timeout", "median_ms": None, "ci_low_ms": None, "ci_high_ms": None, "samples": 0}
    odd = {**record, **failed, "reason": "a\0b", "run": {**record["run"], "command": "c\0d"}}
    huge = {**record, "problem": {**record["problem"], "n": 1 << 40}}
    with Store(database) as store:
        assert transfer.add(store, [odd]).added == 1 and transfer.add(store, [odd]).known == 1
        (there,) = transfer.export(store)
        assert (there["reason"], there["run"]["command"]) == (
            "a\N{REPLACEMENT CHARACTER}b",
            "c\N{REPLACEMENT CHARACTER}d",
        )
        with pytest.raises(errors.DatabaseError, match="cannot hold a value"):
            transfer.add(store, [record, huge])
        assert transfer.export(store) == [there], "all or none"


def test_resolve_takes_a_server(database, path):
    from sparsek_tune.kernel_templates import TEMPLATES

    template = TEMPLATES["forward"]
    device = target_device("cuda:90")
    with Store(database) as store:
        config = template.default(PROBLEM, device)
        store.set_winner(add(store, config=config, device=device, template=template))
    shape = "dtype=bf16,d=128,hq=32,hkv=8,gate=kv,k=1024,w=512,n=16000,b=1"
    result = sparsek("resolve", "--storage", database, "--target", "cuda:90", "--shape", shape, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plans"][0]["kernels"]["forward"]["grade"] != "default"
    missing = sparsek("resolve", "--storage", path, "--target", "cuda:90", "--shape", shape, "--json")
    assert missing.exit_code == 4 and f"there is no database {path}" in json.loads(missing.stdout)["error"]


def test_every_command_takes_a_server(database, path, monkeypatch):
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(path))
    with Store(path) as file:
        file.set_winner(add(file), 0.3, 0.2)
    merged = sparsek("merge", path, "--storage", database, "--json")
    assert merged.exit_code == 0 and json.loads(merged.stdout)["sources"][0]["added"] == 1
    shown = sparsek("show", "--storage", database, "--json")
    assert json.loads(shown.stdout)["entries"][0]["winner"]["default_ms"] == 0.3
    out, job = path.with_name("out.jsonl"), path.with_name("job.db")
    assert sparsek("export", out, "--storage", database).exit_code == 0
    assert sparsek("import", out, "--storage", database).exit_code == 0
    assert sparsek("freeze", job, "--storage", database).exit_code == 0
    assert Store(job, read_only=True).winners() == Store(path, read_only=True).winners()
    page = path.with_name("page.html")
    assert sparsek("report", page, "--storage", database).exit_code == 0 and PASSWORD not in page.read_text()
