"""The command `run` around a tuner that is replaced; tests/tune/test_event_lines.py has the real one."""

from __future__ import annotations

import errno
import io
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import event_lines
import pytest
from click.testing import CliRunner

from sparsek_tune import cli, events, options
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.presets import shapes
from sparsek_tune.problem import target_device
from sparsek_tune.tune import EFFORTS, Event, Row
from sparsek_tune.tune.types import Trial

PROBLEM = shapes(("llama-3.1-8b",), ("n=4096,k=1024",))[0].problem
DEFAULT = TEMPLATES["forward"].default(PROBLEM, target_device("cuda:90"))


def invoke(*args):
    return CliRunner().invoke(cli.main, ["run", *args])


def row(config=None, **changes):
    values = {"default_ms": 2.0, "tuned_ms": 1.0, "speedup": 2.0, "tried": 9, "infeasible": 3, "wrong": 1, "failed": 0}
    return Row(PROBLEM, "forward", config=config, **{**values, **changes})


def fake_tune(monkeypatch, rows=(), error=None):
    """Replace the tuner: it says that ``rows`` are done, and returns them or raises. Returns the list of its calls."""
    calls = []

    def tune(problems, device, store, *, on_event, **settings):
        calls.append((list(problems), device, settings))
        on_event(Event("note", "forward", PROBLEM, 0, 0, None, "a message"))
        for r in rows:
            on_event(Event("done", "forward", PROBLEM, 3, 3, 1.5, "", row=r))
        if error:
            raise error
        return list(rows)

    monkeypatch.setattr("sparsek_tune.tune.tune", tune)
    return calls


def test_without_gpu_it_says_so_and_tunes_for_the_target(cache, monkeypatch):
    monkeypatch.setattr("sparsek_tune.options.gpu", lambda index: None)
    calls = fake_tune(monkeypatch, [row(DEFAULT)])
    result = invoke("--model", "llama-3.1-8b", "--shape", "n=4096,k=1024", "--shape", "n=8192", "--effort=quick")
    assert result.exit_code == 0, result.output
    assert "No GPU is used: static tuning for cuda:90" in result.stderr
    assert "`sparsek-tune resolve --target cuda:90` what is served" in result.stderr
    assert "a message" in result.stderr and "a message" not in result.stdout
    (problems, device, settings) = calls[0]
    assert [p.n for p in problems] == [4096, 8192] and problems[0] == PROBLEM
    assert device == target_device("cuda:90") and settings["effort"] == "quick"
    assert all(word in result.stdout for word in ("forward", "2.000", "1.000", "speed-up", "infeasible", "wrong"))


def test_json_is_a_line_an_event(cache, monkeypatch):
    fake_tune(monkeypatch, [row(DEFAULT)])
    result = invoke("--target", "cuda:90", "--json", "--budget", "9", "--shape", "n=4096,k=1024")
    first, note, done, end = event_lines.parse(result.stdout)
    assert (first["event"], first["effort"], first["budget"]) == ("run", "default", 9.0)
    assert first["problems"] == [PROBLEM._asdict()] and first["device"]["name"] == "target cuda:90"
    assert note["message"] == "a message" and done["row"] == end["rows"][0]
    assert end["rows"][0]["config"] == DEFAULT and end["rows"][0]["problem"]["k"] == 1024
    assert end["database"] == first["database"] == str(cache) and end["static"] is True
    assert (end["error"], end["exit_code"]) == (None, 0) == (None, result.exit_code)


@pytest.mark.parametrize(
    ("rows", "error", "code", "words"),
    [
        ([row(DEFAULT)], KeyboardInterrupt(), 130, "is kept"),
        ([row(None, tuned_ms=None)], None, 5, "no kernel has a working config"),
        ([], None, 5, "budget is too short"),
        ([row(DEFAULT)], ArithmeticError("a bug"), 1, "ArithmeticError: a bug"),
    ],
)
def test_failures_end_the_lines_with_what_is_done(cache, monkeypatch, rows, error, code, words):
    fake_tune(monkeypatch, rows, error)
    result = invoke("--target", "cuda:90", "--json")
    end = event_lines.parse(result.stdout)[-1]
    assert (end["exit_code"], len(end["rows"])) == (code, len(rows)) and words in end["error"]
    assert result.exit_code == code and (code == 1 or words in result.stderr)
    plain = invoke("--target", "cuda:90")
    assert plain.exit_code == code and (code == 1 or words in plain.stderr)
    assert ("speed-up" in plain.stdout) == (code == 5 and bool(rows))


@pytest.mark.parametrize(
    ("theirs", "code", "words"),
    [([row(DEFAULT)], 0, ""), ([], 5, "no kernel was tuned on another"), ([row(None)], 5, "working config on another")],
)
def test_another_model_of_gpu_without_results_is_told_by_the_exit_code(cache, monkeypatch, theirs, code, words):
    device = replace(target_device("cuda:90"), name="one")
    another = replace(device, name="another")
    monkeypatch.setattr("sparsek_tune.options.gpus", lambda text: {0: device, 1: another})
    monkeypatch.setattr("sparsek_tune.options.hide_others", lambda index: None)
    monkeypatch.setattr("sparsek_tune.crew.Crew", lambda *_: SimpleNamespace(others={another: theirs}))
    fake_tune(monkeypatch, [row(DEFAULT)])
    result = invoke("--gpus", "all")
    assert result.exit_code == code and words in result.stderr and "forward" in result.stdout


def test_what_fails_before_the_run_has_an_end_alone(cache, monkeypatch):
    cache.write_bytes(b"this is no database" * 100)
    for args, code in (((), 4), (("--shape", "n=0"), 2), (("--device", "0"), 2)):
        result = invoke("--target", "cuda:90", "--json", *args)
        (end,) = event_lines.parse(result.stdout)
        assert result.exit_code == end["exit_code"] == code and end["error"] in result.stderr
        assert (end["database"], end["device"], end["rows"]) == (None, None, [])


class Full(io.StringIO):
    """Takes ``lines`` lines."""

    def __init__(self, lines):
        super().__init__()
        self.left = lines

    def write(self, text):
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        return super().write(text)


def test_a_line_that_cannot_be_written_stops_the_lines_but_not_the_run():
    out = Full(1)
    with (
        pytest.raises(Exception, match=r"could not be written \(No space left.*in the database") as raised,
        events.EventLines(out) as lines,
    ):
        lines.show(Event("note", "forward", PROBLEM, 0, 0, None, "first"))
        lines.show(Event("note", "forward", PROBLEM, 0, 0, None, "second"))
        out.left = 9
        lines.show(Event("note", "forward", PROBLEM, 0, 0, None, "third"))
    assert raised.value.exit_code == 1
    assert [line["message"] for line in map(json.loads, out.getvalue().splitlines())] == ["first"]
    with pytest.raises(KeyboardInterrupt), events.EventLines(Full(0)) as lines:
        raise KeyboardInterrupt  # the run's own end counts


def test_every_field_of_an_event_is_in_its_line():
    out, now = io.StringIO(), [100.0]
    event = Event(
        "trial", "forward", PROBLEM, 4, 9, 1.5, "ok", 3.0, 0.25, 20.0, Trial(DEFAULT, "ok", 1.75), None, 2, 6, 99.0
    )
    with events.EventLines(out, lambda: now[0]) as lines:
        now[0] += 12.3456
        lines.show(event)
    (line, _) = event_lines.parse(out.getvalue())
    assert line == {
        "schema": 1, "event": "trial", "seconds": 12.346, "template": "forward", "problem": PROBLEM._asdict(),
        "done": 4, "total": 9, "best_ms": 1.5, "message": "ok", "default_ms": 3.0, "rate": 0.25, "seconds_left": 20.0,
        "trial": {"config": DEFAULT, "status": "ok", "median_ms": 1.75}, "row": None, "kernels_done": 2, "kernels": 6,
        "run_seconds_left": 99.0,
    }  # fmt: skip


def test_efforts_reach_the_tuner(cache, monkeypatch):
    for effort in EFFORTS:
        calls = fake_tune(monkeypatch, [row(DEFAULT)])
        assert invoke("--target", "cuda:90", "--effort", effort, "--budget", "7").exit_code == 0
        assert (calls[0][2]["effort"], calls[0][2]["budget"]) == (effort, 7.0)


def test_kernels_reach_the_tuner(cache, monkeypatch):
    for args, kernels in ((), None), (("--kernel", "dq", "--kernel", "forward"), ("dq", "forward")):
        calls = fake_tune(monkeypatch, [row(DEFAULT)])
        assert invoke("--target", "cuda:90", *args).exit_code == 0
        assert calls[0][2]["kernels"] == kernels
    assert "'dk' is not one of 'threshold'" in invoke("--kernel", "dk").stderr


def test_device_hides_the_other_gpus(cache, monkeypatch):
    """The workers that measure inherit the environment; so GPU 0 is the chosen one there and here."""
    calls = fake_tune(monkeypatch, [row(DEFAULT)])
    gpu = replace(target_device("cuda:90"), name="the GPU")
    seen = []
    monkeypatch.setattr(options, "current_device", lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or gpu)
    for visible, index, chosen in ((None, "2", "2"), ("4, 6,7", "1", "6"), ("GPU-abc", "0", "GPU-abc")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert invoke("--device", index).exit_code == 0
        assert seen.pop() == chosen
    assert calls[0][1] is gpu


def test_one_kernel_without_a_working_config_is_not_the_whole_run(cache, monkeypatch):
    fake_tune(monkeypatch, [row(None, tuned_ms=None), row(DEFAULT)])
    result = invoke("--target", "cuda:90")
    assert result.exit_code == 0, result.stderr


def test_the_crew_has_the_other_gpus_the_whole_environment_and_its_part_of_the_cpus(cache, monkeypatch):
    device, made = replace(target_device("cuda:90"), name="one"), []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr("sparsek_tune.options.gpus", lambda text: {1: device, 3: device})
    monkeypatch.setattr("sparsek_tune.tune.pool.default_jobs", lambda pools=1: 16 // pools)
    monkeypatch.setattr("sparsek_tune.crew.Crew", lambda *given: made.append(given) or SimpleNamespace(others={}))
    calls = fake_tune(monkeypatch, [row(DEFAULT)])
    assert invoke("--gpus", "1,3").exit_code == 0
    ((first, others, storage, jobs, env),) = made
    assert first is device and others == {3: device} and storage == str(cache)
    assert jobs == calls[0][2]["jobs"] == 8
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"  # --device counts in it


def test_the_process_of_a_run_on_several_gpus_sees_the_first_alone(cache, monkeypatch):
    device, seen = replace(target_device("cuda:90"), name="one"), []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr("sparsek_tune.options.gpus", lambda text: {1: device, 3: device})
    monkeypatch.setattr(
        "sparsek_tune.crew.Crew",
        lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or SimpleNamespace(others={}),
    )
    fake_tune(monkeypatch, [row(DEFAULT)])
    assert invoke("--gpus", "1,3").exit_code == 0 and seen == ["5"]
