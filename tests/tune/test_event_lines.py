"""`sparsek-tune run --json` in a process of its own, with the real tuner over stages without kernels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import event_lines
import faults
import pytest

from sparsek_tune.db.store import Store

TEMPLATE = faults.template(tiles=(8, 2048), faults=("none", "spills"))
# argv: this folder, seconds that timing a config takes, then the command's.
PROGRAM = """
import functools, sys, time
sys.path.append(sys.argv.pop(1))
seconds = float(sys.argv.pop(1))
import faults
import sparsek_tune.tune
from sparsek_tune import cli, options
from sparsek_tune.tune import bench, tuner, types
template = faults.template(tiles=(8, 2048), faults=("none", "spills"))
sparsek_tune.tune.EFFORTS["quick"] = types.Effort(40, 60.0, 0.01, 3, 0.01, 6, 2, timeout=20.0)
sparsek_tune.tune.tune = functools.partial(
    tuner.tune, templates={"fake": template}, factory=faults.FACTORY,
)
measure = bench.Bench.measure
bench.Bench.measure = lambda *args: time.sleep(seconds) or measure(*args)
options.gpu = lambda index: faults.DEVICE
cli.main(["run", "--effort", "quick", "--json", "--shape", "n=1024", *sys.argv[1:]])
"""


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache.db"


@contextmanager
def running(cache, *args, seconds=0.0, **options):
    env = {**os.environ, "SPARSEK_TUNE_CACHE": str(cache), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(seconds), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(command, env=env, text=True, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def stored(cache):
    with Store(cache, read_only=True) as store:
        problem = event_problem(store)
        return {r.config: r.result for r in store.measurements(faults.DEVICE, TEMPLATE, problem)}, store.winners()


def event_problem(store):
    (summary,) = store.summary()
    return summary.problem


def test_lines_come_as_things_happen_and_say_what_is_stored(cache):
    with running(cache, seconds=0.3) as process:
        lines = []
        for line in process.stdout:
            lines.append(event_lines.check(line))
            if lines[-1]["event"] == "trial" and len(lines) == 3:
                # The line is here while the run goes on, and its result was stored before.
                there = list(stored(cache)[0])
                assert lines[-1]["trial"]["config"] in there and len(there) < 9
        assert process.wait() == 0, process.stderr.read()
    kinds = [line["event"] for line in lines]
    assert kinds == ["run", "start", *["trial"] * 18, "race", "done", "end"]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    measured, (winner,) = stored(cache)
    trials = [line["trial"] for line in lines if line["event"] == "trial"]
    assert {json.dumps(t["config"], sort_keys=True): t["status"] for t in trials} == {
        json.dumps(c, sort_keys=True): r.status for c, r in measured.items()
    }
    assert lines[-1]["rows"] == [lines[-2]["row"]] and lines[-2]["row"]["config"] == json.loads(winner.config)
    late = lines[-4]
    assert late["rate"] > 0 and late["best_ms"] < late["default_ms"] and late["kernels"] == 1
    assert lines[-2]["rate"] is None and lines[-2]["kernels_done"] == 1
    assert lines[-2]["seconds_left"] == lines[-2]["run_seconds_left"] == 0.0

    with running(cache) as process:  # nothing is left to do
        out, _ = process.communicate()
    assert [line["event"] for line in event_lines.parse(out)] == ["run", "start", "done", "end"]


def test_a_reader_that_goes_away_does_not_stop_the_run(cache):
    with running(cache) as process:
        for line in process.stdout:
            if '"trial"' in line:
                break
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait() == 1
    assert "Broken pipe" in error and "Traceback" not in error and "Exception ignored" not in error
    measured, winners = stored(cache)
    assert len(measured) == 18 and len(winners) == 1


def test_nobody_listens_at_all(cache):
    """Progress and events in one pipe, as in ``run --json 2>&1 | head -1``."""
    with running(cache, stderr=subprocess.STDOUT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() in (1, 120)  # 120: Python could not even flush stderr
    assert len(stored(cache)[0]) == 18 and len(stored(cache)[1]) == 1


def test_a_full_disk_does_not_stop_the_run(cache):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full, running(cache, stdout=full) as process:
        _, error = process.communicate()
    assert process.returncode == 1 and "No space left" in error and "Traceback" not in error
    assert len(stored(cache)[0]) == 18 and len(stored(cache)[1]) == 1


def test_an_interrupted_run_ends_its_lines(cache):
    with running(
        cache, seconds=0.3, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(event_lines.check(line))
            trials = sum(line["event"] == "trial" for line in lines)
            if trials == 3 and lines[-1]["event"] == "trial":  # once: another would meet an interpreter that shuts down
                process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert lines[-1]["event"] == "end" and lines[-1]["exit_code"] == 130 and "is kept" in lines[-1]["error"]
    assert 3 <= len(stored(cache)[0]) <= 18


def test_static_lines(cache):
    with running(cache, "--target", "cuda:90") as process:
        out, _ = process.communicate()
    lines = event_lines.parse(out)
    trials = [line for line in lines if line["event"] == "trial"]
    assert [line["done"] for line in trials] == list(range(1, 7)) and {line["total"] for line in trials} == {6}
    assert {line["trial"]["status"] for line in trials} == {"compiled", "infeasible"}
    assert lines[0]["static"] and lines[-1]["rows"][0]["tried"] == 6
