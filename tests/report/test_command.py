"""The command report: from the database or from a file, to a file or to stdout, and what it refuses."""

from __future__ import annotations

import os
import sys

import pytest
import simulated
from click.testing import CliRunner
from database import execute, make

from sparsek_tune import cli
from sparsek_tune.db import records as portable
from sparsek_tune.db import transfer
from sparsek_tune.db.store import Store


@pytest.fixture
def file(tmp_path):
    """Records as export writes them."""
    path = tmp_path / "shared.jsonl"
    with path.open("w") as out:
        portable.write(out, simulated.simulate([simulated.SHORT], [simulated.H100], trials=6))
    return path


def invoke(*args, **options):
    return CliRunner().invoke(cli.main, ["report", *map(str, args)], **options)


def test_a_database_and_its_records_give_one_page(cache, file, tmp_path):
    with Store(cache) as store, file.open() as opened:
        transfer.add(store, portable.read(opened, "x"))
    before = cache.read_bytes()
    result = invoke(tmp_path / "a.html")
    assert result.exit_code == 0 and "measurements shown in" in result.stderr and not result.stdout
    text = (tmp_path / "a.html").read_text()
    assert "NVIDIA H100 80GB HBM3" in text and text.startswith("<!doctype html>")
    assert cache.read_bytes() == before
    assert invoke(tmp_path / "b.html", "--from", file).exit_code == 0
    assert (tmp_path / "b.html").read_text().replace("shared.jsonl", "cache.db") == text


def test_pipes(cache, file):
    piped = invoke("-", "--from", "-", input=file.read_text())
    assert piped.exit_code == 0 and not cache.exists()
    assert piped.stdout == invoke("-", "--from", file).stdout.replace("shared.jsonl", "stdin")
    assert piped.stdout.rstrip().endswith("</html>")


def test_a_store_of_made_up_kernels(cache, tmp_path):
    """Those of this version know neither its config nor its source."""
    make(cache)
    assert invoke(tmp_path / "a.html").exit_code == 0
    text = (tmp_path / "a.html").read_text()
    assert "other source" in text and "1.50&#215;" in text and "BLOCK=64 STAGES=2" in text


def test_nothing_to_show(cache, tmp_path):
    missing = invoke(tmp_path / "a.html")
    assert missing.exit_code == 4 and "there is no database" in missing.stderr
    with Store(cache):
        pass
    empty = tmp_path / "empty.jsonl"
    with empty.open("w") as out:
        portable.write(out, [])
    for args in ((), ("--from", empty)):
        result = invoke(tmp_path / "a.html", *args)
        assert result.exit_code == 5 and "nothing is stored" in result.stderr and "sparsek-tune run" in result.stderr
    assert not (tmp_path / "a.html").exists()


def test_what_must_not_be_overwritten_is_not(cache, file, tmp_path):
    make(cache)
    database, lines = cache.read_bytes(), file.read_text()
    link = tmp_path / "link"
    link.symlink_to(cache)
    for target in (cache, link):
        result = invoke(target, "--from", file)
        assert result.exit_code == 2 and "must not be a database" in result.stderr
    result = invoke(file, "--from", file)
    assert result.exit_code == 2 and "must not be the file of --from" in result.stderr
    assert cache.read_bytes() == database and file.read_text() == lines


def test_the_page_before_stays_where_the_new_one_fails(cache, file, tmp_path, monkeypatch):
    target = tmp_path / "a.html"
    target.write_text("before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result = invoke(target, "--from", file)
    assert result.exit_code == 1 and "No space left" in result.stderr
    assert target.read_text() == "before" and not list(tmp_path.glob(".a.html*"))


def test_one_source_alone_is_shown(cache, file, tmp_path, monkeypatch):
    result = invoke(tmp_path / "a.html", "--from", file, "--storage", make(cache))
    assert result.exit_code == 2 and "--from and --storage exclude each other" in result.stderr
    monkeypatch.setenv("SPARSEK_TUNE_STORAGE", str(cache))  # a default
    assert invoke(tmp_path / "a.html", "--from", file).exit_code == 0


def test_bad_records_are_refused_by_line(cache, file, tmp_path):
    file.write_text(file.read_text() + '{"half')
    result = invoke(tmp_path / "a.html", "--from", file)
    assert result.exit_code == 4 and "shared.jsonl, line" in result.stderr and not (tmp_path / "a.html").exists()
    assert invoke(tmp_path / "a.html", "--from", tmp_path / "none").exit_code == 2
    assert invoke(tmp_path / "no" / "a.html", "--from", file).exit_code != 0


@pytest.mark.parametrize(
    "change",
    ["UPDATE problem SET n = 'abc'", "UPDATE config SET key = 'no JSON'", "UPDATE config SET key = '[1]'",
     "UPDATE winner SET tuned_ms = 9e999", "UPDATE device SET cc = x'00'", "UPDATE device SET name = x'ff'"],
)  # fmt: skip
def test_a_database_of_nonsense_is_named(cache, tmp_path, change):
    make(cache)
    execute(cache, change)
    result = invoke(tmp_path / "a.html")
    assert result.exit_code == 4 and "holds what it should not" in result.stderr


def test_a_missing_matplotlib_is_named(cache, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke(tmp_path / "a.html", "--from", file)
    assert result.exit_code == 2 and "pip install 'sparsek-tune[report]'" in result.stderr
