"""The document is whole on disk at any time; the tables hold what was measured, and dashes where nothing was."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from document import document, entry

from sparsek_tune.bench import report


def test_written_and_read(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text("something older")
    report.write(path, document(entry(4096)))
    assert report.read(path) == document(entry(4096))
    assert os.listdir(tmp_path) == ["bench.json"]


def test_a_killed_writer_leaves_the_older_document(tmp_path):
    """Killed in the middle of the text, and while nothing is buffered that could be lost later."""
    path = tmp_path / "bench.json"
    report.write(path, document(entry(4096)))
    code = (
        "import json, os, pathlib, sys\n"
        "from sparsek_tune.bench import report\n"
        "def dump(document, file, **options):\n"
        "    file.write('{\"half'); file.flush(); os._exit(9)\n"
        "json.dump = dump\n"
        "report.write(pathlib.Path(sys.argv[1]), {})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert report.read(path) == document(entry(4096))


def test_a_document_that_cannot_be_written_leaves_the_older_one(tmp_path):
    path = tmp_path / "bench.json"
    report.write(path, document())
    with pytest.raises(TypeError):
        report.write(path, {"cases": [object()]})
    assert report.read(path) == document() and os.listdir(tmp_path) == ["bench.json"]


def test_the_file_is_put_in_place_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    report.write(path, document())

    def replace(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space"):
        report.write(path, document(entry(4096)))
    assert report.read(path) == document() and os.listdir(tmp_path) == ["bench.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is no JSON document"), ("[]", "was not written by"), ('{"cases": []}', "was not written by"),
     (json.dumps({**document(), "schema": 1}), "has schema 1")],
)  # fmt: skip
def test_other_files_are_refused(text, words, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        report.read(path)


def test_documents_of_one_machine_are_merged():
    a, b = document(entry(4096)), document(entry(8192))
    b["peers"], b["missing"] = {"adasplash": {"note": "", "version": "1"}}, {}
    both = report.merge([a, b])
    assert [c["problem"]["n"] for c in both["cases"]] == [4096, 8192]
    assert set(both["peers"]) == {"cudnn", "adasplash"} and both["missing"] == {}
    b["versions"] = {**b["versions"], "torch": "2.12.0"}
    with pytest.raises(ValueError, match=r"versions of .* differs"):
        report.merge([a, b])


def row(text, *words):
    return next(line for line in text.splitlines() if all(w in line for w in words)).split()


def test_tables(capsys):
    failed = {"problem": entry(8192)["problem"], "distribution": "slope", "error": "wrong!", "peers": {}}
    report.show(document(entry(65536), failed))
    out = capsys.readouterr().out
    name = "n=65536 k=1024 w=0 iid"
    stages = row(out, name, "exact")
    assert stages[4:10] == ["0.100", "0.400", "0.100", "2.000", "3.000", "4.000"]
    assert stages[10:] == ["0.450", "18.000", "400.000", "250.000", "160.000", "exact", "2.5e-03"]
    totals = row(out, name, "9.600")
    assert totals[4:] == [
        "2.500",
        "2.400",
        "9.600",
        "320.000",
        "280.000",
        "1024.000",
        "2048.000",
        "50.000",
        "60.000",
        "70.000",
    ]
    assert row(out, name, "cudnn")[4:] == [
        "cudnn",
        "10.000",
        "9.000-11.000",
        "4.000",
        "30.000",
        "27.000-33.000",
        "3.125",
    ]
    assert "OutOfMemoryError: no room" in out and "the package adasplash is not installed" in out
    assert "wrong!" in out and row(out, "slope", "wrong!")[4:10] == ["-"] * 6
    assert report.failures(document(entry(65536), failed)) == ["n=8192 k=1024 w=0 slope: wrong!"]
