"""``sparsek-tune bench`` from its options to its files, on the CPU."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from document import document, entry

from sparsek_tune import cli
from sparsek_tune.bench import check, plot, report, run
from sparsek_tune.bench.cases import LENGTHS

TINY = ("--shape", "hq=4,hkv=2,d=16,n=96,k=16,w=8,dtype=fp32", "--seconds", "0.01")


def invoke(*args):
    return CliRunner().invoke(cli.main, ["bench", *map(str, args)])


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("sparsek_tune.options.gpu", lambda index: None)


def test_tables_document_and_plot(cpu, tmp_path):
    file, picture = tmp_path / "b.json", tmp_path / "b.png"
    distributions = ("--distribution", "iid", "--distribution", "slope")
    result = invoke(*TINY, *distributions, "--peer", "flash", "--peer", "cudnn", "--json", file, "--plot", picture)
    assert result.exit_code == 0, result.output + str(result.exception)
    found = json.loads(file.read_text())
    assert [c["distribution"] for c in found["cases"]] == ["iid", "slope"]
    assert found["cases"][0]["peers"]["flash"]["forward"]["median"] > 0 and found["command"].startswith("sparsek-tune")
    assert "failed" in found["cases"][0]["peers"]["cudnn"]  # the CPU has none, and that is all that happens
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "threshold" in result.stdout and "flash" in result.stdout and "1/2 n=96" in result.stderr
    again = invoke("--from", file, "--plot", tmp_path / "again.png")
    assert again.exit_code == 0 and again.stdout == result.stdout
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()


def test_json_on_stdout_replaces_the_tables(cpu):
    result = invoke(*TINY, "--peer", "none", "--json", "-", "--no-backward")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == 2 and len(found["cases"]) == 1 and found["cases"][0]["peers"] == {}


def test_a_failed_check_is_exit_code_1(cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "at_length", lambda *args: check.Verdict({"out": 0.5}, "out is wrong", 1e-5))
    result = invoke(*TINY, "--peer", "none", "--json", tmp_path / "b.json")
    assert result.exit_code == 1 and "out is wrong" in result.stderr and "out is wrong" in result.stdout
    assert json.loads((tmp_path / "b.json").read_text())["cases"][0]["failed_check"]
    piped = json.loads(invoke(*TINY, "--peer", "none", "--json", "-").stdout)
    assert piped["exit_code"] == 1 and "out is wrong" in piped["error"] and piped["cases"]


def test_interrupted_keeps_what_was_measured(cpu, monkeypatch, tmp_path):
    right, calls = run.Bench._ours, []

    def second(self, case, entry):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        right(self, case, entry)

    monkeypatch.setattr(run.Bench, "_ours", second)
    both = ("--distribution", "iid", "--distribution", "slope", "--peer", "none")
    result = invoke(*TINY, *both, "--json", tmp_path / "b.json")
    assert result.exit_code == 130 and "what was measured is in" in result.stderr
    (kept,) = report.read(tmp_path / "b.json")["cases"]
    assert kept["distribution"] == "iid" and kept["totals"]


def test_killed_keeps_what_was_measured(tmp_path):
    """SIGKILL after the first of two cases."""
    code = (
        "import os, signal, sys; sys.path[:0] = [sys.argv[1]]\n"
        "import fake_machine; from sparsek_tune import cli, options\n"
        "from sparsek_tune.bench import machine, ours, run\n"
        "from sparsek_tune.problem import target_device\n"
        "options.gpu = lambda index: target_device('cuda:90')\n"
        "machine.Cuda = fake_machine.Cpu; ours.stages = fake_machine.reference_stages\n"
        "right = run.Bench._ours\n"
        "def ours_(self, case, entry):\n"
        "    if case.distribution == 'slope': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    right(self, case, entry)\n"
        "run.Bench._ours = ours_\n"
        "cli.main(['bench', *sys.argv[2:]])"
    )
    file = tmp_path / "b.json"
    options = (*TINY, "--distribution", "iid", "--distribution", "slope", "--peer", "none", "--json", str(file))
    done = subprocess.run([sys.executable, "-c", code, str(__file__).rsplit("/", 1)[0], *options], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert [c["distribution"] for c in report.read(file)["cases"]] == ["iid"]


def test_no_gpu(no_gpu):
    result = invoke(*TINY)
    assert result.exit_code == 3 and "no GPU" in result.stderr


def test_redrawing_needs_no_gpu(no_gpu, tmp_path):
    for n in (4096, 8192):
        report.write(tmp_path / f"{n}.json", document(entry(n)))
    result = invoke("--from", tmp_path / "4096.json", "--from", tmp_path / "8192.json", "--plot", tmp_path / "b.png")
    assert result.exit_code == 0 and "cudnn" in result.stdout and (tmp_path / "b.png").exists()
    assert "n=4096" in result.stdout and "n=8192" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--plot", "{tmp}/b.txt"), "must end in .png"),
        (("--distribution", "trained"), "needs --recorded"),
        (("--recorded", "{tmp}/none.pt"), "does not exist"),
        (("--recorded", "{tmp}/text.pt"), "is no file of recorded tensors"),
        (("--distribution", "trained", "--recorded", "{tmp}/small.pt"), "has n=64, the shape needs n=96"),
        (("--shape", "n=many"), "whole number"),
        (("--peer", "nobody"), "nobody"),
        (("--seconds", "0"), "not in the range"),
        (("--seconds", "nan"), "not a finite number"),
        (("--peer-limit", "inf"), "not a finite number"),
        (("--from", "{tmp}/text.pt"), "no JSON document"),
        (
            ("--from", "{tmp}/text.pt", "--json", "{tmp}/x.json"),
            "measures nothing, but there is --json",
        ),
        (("--from", "{tmp}/text.pt", "--seconds", "3"), "but there is --seconds"),
        (("--from", "{tmp}/text.pt", "--device", "0"), "but there is --device"),
        (("--from", "{tmp}/text.pt", "--no-backward"), "but there is --backward"),
    ],
)
def test_wrong_options_are_found_before_anything_runs(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsek_tune.options.gpu", lambda index: pytest.fail("looked for a GPU"))
    (tmp_path / "text.pt").write_text("text")
    q, k = torch.zeros(1, 4, 64, 16), torch.zeros(1, 2, 64, 16)
    torch.save({"query": q, "key": k, "value": k, "scores": k[..., 0].clone()}, tmp_path / "small.pt")
    given = [o.format(tmp=tmp_path) for o in options]
    result = invoke(*given) if "--from" in options else invoke(*TINY, *given)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split()), result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--json", "{tmp}/no/b.json"), "no/b.json cannot be written: No such file or directory"),
        (("--json", "{tmp}"), "cannot be written: Is a directory"),
        (("--plot", "{tmp}/no/b.png"), "no/b.png cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_found_before_anything_runs(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsek_tune.options.gpu", lambda index: pytest.fail("looked for a GPU"))
    result = invoke(*TINY, *(o.format(tmp=tmp_path) for o in options))
    assert result.exit_code == 1 and words in " ".join(result.stderr.split()), result.stderr


def test_a_disk_that_is_full_for_the_plot(no_gpu, tmp_path, monkeypatch):
    report.write(tmp_path / "a.json", document(entry(4096)))

    def draw(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plot, "draw", draw)
    result = invoke("--from", tmp_path / "a.json", "--plot", tmp_path / "b.png")
    assert result.exit_code == 1 and "b.png cannot be written: No space left" in " ".join(result.stderr.split())


def test_no_matplotlib_is_found_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("sparsek_tune.options.gpu", lambda index: pytest.fail("looked for a GPU"))
    monkeypatch.setattr(plot, "available", lambda extra: "matplotlib is not installed")
    result = invoke(*TINY, "--plot", tmp_path / "b.png")
    assert result.exit_code == 2 and "matplotlib is not installed" in result.stderr


def test_trained_reads_the_recording(cpu, tmp_path):
    k = torch.randn(1, 2, 100, 16)
    recorded = {"query": torch.randn(1, 4, 100, 16), "key": k, "value": k, "scores": torch.randn(1, 2, 100)}
    torch.save(recorded, tmp_path / "r.pt")
    result = invoke(
        *TINY, "--distribution", "trained", "--recorded", tmp_path / "r.pt", "--peer", "none", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["cases"][0]["distribution"] == "trained"


def test_defaults(cpu, monkeypatch):
    seen = {}

    def fake(self, cases, peers, command):
        seen.update(cases=cases, peers=[p.name for p in peers], settings=self.settings)
        return document()

    monkeypatch.setattr(run.Bench, "run", fake)
    assert invoke().exit_code == 0
    assert [(c.shape.n, c.shape.k, c.shape.w) for c in seen["cases"]] == list(LENGTHS)
    assert seen["peers"] == ["cudnn", "flash", "flex", "nsa", "adasplash"]
    assert seen["settings"] == run.Settings()


def test_operators_do_not_load_the_benchmark():
    code = "import sys, sparsek_tune.ops; print([m for m in sys.modules if 'bench' in m and 'sparsek' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
