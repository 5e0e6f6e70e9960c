"""The commands export, import, merge and freeze."""

import gzip
import json
import lzma
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from database import OK, add, count, execute, make

from sparsek_tune import cli
from sparsek_tune.db.store import Store
from sparsek_tune.kernel_templates.base import Config


def invoke(*args, **options):
    return CliRunner().invoke(cli.main, [str(a) for a in args], **options)


def test_there_and_back_by_file_and_by_pipe(cache, tmp_path, monkeypatch):
    make(cache)
    file = tmp_path / "shared.jsonl"
    result = invoke("export", file)
    assert result.exit_code == 0 and "1 records written" in result.stderr and not result.stdout
    piped = invoke("export", "-")
    assert piped.stdout == file.read_text() and len(piped.stdout.splitlines()) == 2
    for other, args, options in (("a", [file], {}), ("b", ["-"], {"input": piped.stdout}), ("c", [file, file], {})):
        monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(tmp_path / other))
        result = invoke("import", *args, "--json", **options)
        assert result.exit_code == 0, result.output
        sources = json.loads(result.stdout)["sources"]
        assert [(s["added"], s["known"], s["winners"]) for s in sources] == [(1, 0, 1), (0, 1, 0)][: len(args)]
        assert count(tmp_path / other) == 1


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_packed_files_and_damaged_ones(cache, tmp_path, monkeypatch, ending, pack):
    make(cache)
    text = invoke("export", "-").stdout.encode()
    file, other, packed = tmp_path / f"shared.jsonl{ending}", tmp_path / "other.db", pack(text)
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(other))
    Store(other)
    for damaged in (packed[: len(packed) // 2], packed[:40] + b"damage" + packed[46:], text, b""):
        file.write_bytes(damaged)
        result = invoke("import", file)
        assert result.exit_code == 4 and file.name in result.stderr, result.output
        assert count(other) == 0
    file.write_bytes(packed)
    assert invoke("import", file).exit_code == 0 and count(other) == 1


def test_conflicts_are_shown(cache, tmp_path):
    make(cache)
    other = tmp_path / "other.db"
    with Store(other) as store:
        store.set_winner(add(store, config=Config(BLOCK=16, STAGES=1)), 0.3, 0.1)
    result = invoke("merge", other)
    assert result.exit_code == 0 and "Two configs won the same problem" in result.stdout
    assert "3.000" in result.stdout and "1.500" in result.stdout
    assert count(cache) == 2 and count(other) == 1
    again = json.loads(invoke("merge", other, "--json").stdout)
    assert again["sources"] == [{"source": str(other), "added": 0, "known": 1, "winners": 0, "conflicts": []}]


def test_a_bad_file_among_good_ones_changes_nothing(cache, tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    make(tmp_path / "other.db")
    os.environ["SPARSEK_TUNE_CACHE"] = str(tmp_path / "other.db")  # the fixture puts it back
    assert invoke("export", good).exit_code == 0
    os.environ["SPARSEK_TUNE_CACHE"] = str(cache)
    bad.write_text(good.read_text() + '{"half of a')
    result = invoke("import", good, bad, "--json")
    assert result.exit_code == 4 and not cache.exists()
    assert f"{bad}, line 3" in json.loads(result.stdout)["error"] and json.loads(result.stdout)["exit_code"] == 4
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert f"{binary}, line 1" in invoke("import", binary).stderr


def test_what_is_missing_is_named(cache, tmp_path):
    assert invoke("export", tmp_path / "x").exit_code == 4 and not (tmp_path / "x").exists()
    assert invoke("freeze", tmp_path / "x").exit_code == 4
    missing = invoke("import", tmp_path / "none.jsonl")
    assert missing.exit_code == 2 and "none.jsonl" in missing.stderr
    assert invoke("merge", tmp_path / "none.db").exit_code == 2
    make(cache)
    result = invoke("export", tmp_path / "no" / "x")
    assert result.exit_code == 1 and "cannot be written: No such file or directory" in result.stderr


@pytest.mark.parametrize("end", ["-wal", "-shm", "-journal"])
def test_what_belongs_to_a_database_is_not_written_over(cache, tmp_path, end):
    """What was committed last may be in its log alone."""
    make(cache)
    part = cache.with_name(cache.name + end)
    (tmp_path / "link").symlink_to(part)
    for command in (("export", part), ("report", part), ("export", tmp_path / "link")):
        result = invoke(*command)
        assert result.exit_code == 2 and f"part of the database {cache}" in result.stderr
    assert not part.exists() or b"sparsek" not in part.read_bytes()  # SQLite's own, where readers made it
    assert invoke("export", tmp_path / f"mine{end}").exit_code == 0


def test_merge_takes_no_server_and_shows_no_password(cache):
    result = invoke("merge", "postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert result.exit_code == 2 and "must be files" in result.stderr and "secret" not in result.stderr


def test_files_of_records_and_databases_are_not_taken_for_each_other(cache, tmp_path):
    make(cache)
    invoke("export", tmp_path / "shared.jsonl")
    before = cache.read_bytes()
    result = invoke("import", cache, "--storage", tmp_path / "new.db")
    assert result.exit_code == 2 and f"{cache} is a database, no file of records" in result.stderr
    result = invoke("merge", tmp_path / "shared.jsonl", "--storage", tmp_path / "new.db")
    assert result.exit_code == 4 and "a file of records is for `sparsek-tune import`" in result.stderr
    (tmp_path / "empty.db").touch()  # a database without tables, to SQLite
    assert invoke("merge", tmp_path / "empty.db", "--storage", tmp_path / "new.db").exit_code == 0
    assert cache.read_bytes() == before and (tmp_path / "empty.db").read_bytes() == b""


def test_an_export_that_fails_leaves_the_file_before(cache, tmp_path, monkeypatch):
    make(cache)
    file = tmp_path / "shared.jsonl"
    file.write_text("before")
    monkeypatch.setattr("sparsek_tune.db.records.write", lambda out, found: out.write("x") and 1 / 0)
    assert invoke("export", file).exit_code == 1
    assert file.read_text() == "before" and sorted(p.name for p in tmp_path.glob("*shared*")) == ["shared.jsonl"]


def test_a_full_disk(cache, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    make(cache)
    done = subprocess.run(
        f"{sys.executable} -m sparsek_tune.cli export - > /dev/full", shell=True, capture_output=True, text=True
    )
    assert done.returncode != 0 and "No space left" in done.stderr


def test_a_frozen_database_is_served(cache, tmp_path, monkeypatch):
    make(cache)
    result = invoke("freeze", tmp_path / "job.db")
    assert result.exit_code == 0 and result.stdout.split()[1] == str(tmp_path / "job.db")
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(tmp_path / "job.db"))
    shown = json.loads(invoke("show", "--json").stdout)["entries"]
    assert shown[0]["winner"]["config"] == {"BLOCK": 64, "STAGES": 2}
    again = invoke("freeze", tmp_path / "job.db", "--json")
    assert again.exit_code == 1 and "exists already" in json.loads(again.stdout)["error"]


def test_the_winners_of_an_import_are_served(cache, tmp_path):
    """Also one of another machine, as near."""
    file = tmp_path / "shared.jsonl"
    with Store(cache) as store:
        store.set_winner(add(store, OK), 0.3, 0.2)
    invoke("export", file)
    cache.rename(tmp_path / "away.db")
    assert invoke("import", file).exit_code == 0
    with Store(cache, read_only=True) as store, Store(tmp_path / "away.db", read_only=True) as away:
        assert store.winners() == away.winners() != []


def test_an_export_onto_a_database_a_link_or_a_pipe(cache, tmp_path):
    make(cache)
    before = cache.read_bytes()
    link, pipe = tmp_path / "link.jsonl", tmp_path / "pipe"
    for target in (cache, tmp_path / "alias"):
        if target != cache:
            target.symlink_to(cache)
        result = invoke("export", target)
        assert result.exit_code == 2 and "must not be a database" in result.stderr
    assert cache.read_bytes() == before
    link.symlink_to(tmp_path / "real.jsonl")
    assert invoke("export", link).exit_code == 0 and link.is_symlink()
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    assert invoke("export", pipe).exit_code == 0 and pipe.is_fifo()
    assert reader.communicate(timeout=20)[0] == (tmp_path / "real.jsonl").read_text()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE problem SET n = 'abc'",
        "UPDATE config SET key = '[1]'",
        "UPDATE config SET key = 'no JSON'",
        "UPDATE winner SET tuned_ms = -1",
        "UPDATE winner SET tuned_ms = 9e999",
        "UPDATE device SET cc = x'00'",
    ],
)
def test_a_hostile_database_is_not_merged(cache, tmp_path, change):
    make(cache)
    other = make(tmp_path / "other.db")
    execute(other, change)
    result = invoke("merge", other, "--json")
    assert result.exit_code == 4 and "other.db" in json.loads(result.stdout)["error"]
    assert count(cache) == 1


def test_a_file_that_cannot_be_read(cache):
    result = invoke("import", "/proc/self/mem", "--json")
    assert result.exit_code == 1 and "cannot be read" in json.loads(result.stdout)["error"]
