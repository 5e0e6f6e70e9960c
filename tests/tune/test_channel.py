"""Worker processes: whatever a call does to one, the parent gets an answer in time and the next call works."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from sparsek_tune.tune.channel import CallFailed, Worker, WorkerDied, WorkerTimeout


@pytest.fixture
def echo():
    with Worker("faults:Echo", 1, "two") as worker:
        yield worker


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as f:
        return f.read().split()[2] != "Z"


def gone(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_answers_from_one_process_that_got_its_arguments(echo):
    value, pid, arguments = echo.call("echo", {"a": [1, 2.5]}, timeout=30)
    assert value == {"a": [1, 2.5]} and arguments == (1, "two") and pid != os.getpid()
    assert echo.call("echo", b"x" * 3_000_000, timeout=30)[:2] == (b"x" * 3_000_000, pid)


def test_an_exception_leaves_the_process(echo):
    pid = echo.call("echo", 0, timeout=30)[1]
    with pytest.raises(CallFailed, match="AttributeError") as error:
        echo.call("missing", timeout=30)
    assert not error.value.fatal and echo.call("echo", 0, timeout=30)[1] == pid


def test_a_result_that_does_not_pickle_is_the_calls_failure(echo):
    with pytest.raises(CallFailed, match=r"pickle|local"):
        echo.call("unpicklable", timeout=30)
    assert echo.call("echo", 0, timeout=30)[0] == 0


def test_a_hang_is_killed_with_all_its_children(echo, tmp_path):
    pid, note = echo.call("echo", 0, timeout=30)[1], tmp_path / "pid"
    start = time.monotonic()
    with pytest.raises(WorkerTimeout):
        echo.call("child", str(note), timeout=1.0)
    assert time.monotonic() - start < 10
    assert gone(pid) and gone(int(note.read_text()))
    assert echo.call("echo", 0, timeout=30)[1] != pid


def test_a_service_that_cannot_start_says_why():
    with Worker("faults:Echo", "fail") as worker, pytest.raises(CallFailed, match=r"could not start.*refused"):
        worker.call("echo", 0, timeout=30)


def test_a_closed_worker_stays_closed(echo):
    pid = echo.call("echo", 0, timeout=30)[1]
    echo.close()
    assert gone(pid)
    with pytest.raises(WorkerDied):
        echo.call("echo", 0, timeout=30)


def test_workers_die_with_their_parent(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from sparsek_tune.tune.channel import Worker
print(Worker("faults:Echo").call("echo", 0, timeout=60)[1], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60).stdout
    assert gone(int(out))


def test_the_working_directory_shadows_nothing(tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    with Worker("faults:Echo") as worker:
        assert worker.call("echo", 5, timeout=30)[0] == 5
