"""Worker processes: whatever a call does to one, the parent gets an answer in time and the next call works."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import faults
import pytest

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune import channel
from sparsek_tune.tune.bench import Bench, BenchService
from sparsek_tune.tune.channel import CallFailed, MachineError, Worker, WorkerDied, WorkerTimeout
from sparsek_tune.tune.forkserver import ForkServer
from sparsek_tune.tune.redzone import MemoryCorrupted
from sparsek_tune.tune.types import Spec


@pytest.fixture(scope="module")
def server():
    server = ForkServer("faults:Echo")
    yield server
    server.close()


@pytest.fixture(params=["started", "forked"])
def echo(request):
    """A worker, started from nothing or forked."""
    server = request.getfixturevalue("server") if request.param == "forked" else None
    with Worker("faults:Echo", 1, "two", server=server) as worker:
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


def test_after_a_fatal_failure_the_next_call_gets_another_process(echo):
    """Whatever the GPU's context says after an illegal address counts against nobody else."""
    pid = echo.call("echo", 0, timeout=30)[1]
    with pytest.raises(CallFailed, match="illegal memory access") as error:
        echo.call("lose_context", timeout=30)
    assert error.value.fatal and error.value.status == "runtime" and gone(pid)
    assert echo.call("echo", 0, timeout=30)[1] != pid


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


@pytest.mark.parametrize("server", ["None", "ForkServer('faults:Echo')"])
def test_workers_die_with_their_parent(tmp_path, server):
    code = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from sparsek_tune.tune.channel import ForkServer, Worker
print(Worker("faults:Echo", server={server}).call("echo", 0, timeout=60)[1], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60).stdout
    assert gone(int(out))


def test_the_working_directory_shadows_nothing(tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    with Worker("faults:Echo") as worker:
        assert worker.call("echo", 5, timeout=30)[0] == 5


def test_a_process_that_died_between_two_calls_is_held_against_neither(echo):
    pid = echo.call("echo", 0, timeout=30)[1]
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    value, other, _ = echo.call("echo", 7, timeout=30)
    assert value == 7 and other != pid


@pytest.mark.parametrize("server", ["None", "ForkServer('faults:Echo')"])
def test_what_a_worker_started_dies_with_the_parent_too(tmp_path, server):
    """Not the worker alone, as when it ends: ptxas may take minutes, and then nobody waits for it."""
    note = tmp_path / "pid"
    code = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from sparsek_tune.tune.channel import ForkServer, Worker
worker = Worker("faults:Echo", server={server})
print(worker.call("echo", 0, timeout=60)[1], flush=True)
threading.Thread(target=worker.call, args=("program", {str(note)!r}), kwargs=dict(timeout=60), daemon=True).start()
while not os.path.exists({str(note)!r}) or not open({str(note)!r}).read():
    time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60).stdout
    assert gone(int(out)) and gone(int(note.read_text()))


def test_a_process_that_cannot_be_killed_does_not_hold_the_run_up(echo, monkeypatch):
    """One that hangs in the driver of a GPU: it dies when the driver lets it."""
    pid = echo.call("echo", 0, timeout=30)[1]
    os.kill(pid, signal.SIGSTOP)  # nor does it see that its pipes are closed
    monkeypatch.setattr(channel, "DEATH_SECONDS", 0.2)
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    start = time.monotonic()
    echo.kill()
    assert time.monotonic() - start < 5 and alive(pid)
    assert echo.call("echo", 0, timeout=30)[1] != pid
    monkeypatch.undo()
    os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE])
def test_a_machine_that_is_at_its_end_is_no_fault_of_the_call(echo, number):
    pid = echo.call("echo", 0, timeout=30)[1]
    with pytest.raises(MachineError, match=os.strerror(number)):
        echo.call("fail", number, timeout=30)
    assert echo.call("echo", 0, timeout=30)[1] != pid
    with pytest.raises(CallFailed, match="No such file"):
        echo.call("fail", errno.ENOENT, timeout=30)


def test_a_worker_that_cannot_be_started_is_the_machines_fault(monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(channel.subprocess, "Popen", refuse)
    with Worker("faults:Echo") as worker, pytest.raises(MachineError, match=r"cannot be started.*temporarily"):
        worker.call("echo", 0, timeout=30)


# --- the measuring process


SPEC = Spec("fake", faults.PROBLEM, faults.DEVICE, {})
GOOD = Config(tile=32, fault="none")


@pytest.fixture
def lost(tmp_path, monkeypatch):
    """The file whose existence takes the GPU away."""
    monkeypatch.setenv("FAULTS_LOST", str(tmp_path / "lost"))
    return tmp_path / "lost"


def test_what_could_be_set_up_before_and_cannot_any_more_is_held_against_no_candidate(lost):
    with Bench(faults.FACTORY) as bench:
        assert bench.verify(SPEC, GOOD) is None
        lost.touch()
        assert bench.verify(SPEC, GOOD) is None  # what is set up stays so
        with pytest.raises(WorkerDied):
            bench.measure(SPEC, Config(tile=32, fault="kill"), 0.01, 1e9)
        with pytest.raises(MachineError, match=r"could be measured before, and cannot any more: .*no CUDA-capable"):
            bench.verify(SPEC, GOOD)
        lost.unlink()
        assert bench.verify(SPEC, GOOD) is None


def test_small_problems_are_met_beside_what_stays_set_up_and_is_looked_at_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTS_LOG", str(tmp_path / "log"))
    other = SPEC._replace(template="another")
    with Bench(faults.FACTORY) as bench:
        assert bench.verify(SPEC, GOOD) is None
        assert bench.verify_cases(other, GOOD) is None
        assert bench.verify_cases(SPEC, Config(tile=32, fault="wrong in cases")) == "out: one row is off"
        assert bench.verify(SPEC, GOOD) is None
    assert (tmp_path / "log").read_text().count("measure") == 1
    service = BenchService(faults.FACTORY, "measure")
    assert service.verify_cases(other, GOOD) is None
    service.verify(SPEC, GOOD, True)

    def check(self):
        if self.spec == SPEC:
            raise MemoryCorrupted("what is shared was written to")

    monkeypatch.setattr(faults.Stage, "check", check)
    with pytest.raises(MemoryCorrupted):
        service.verify_cases(other, GOOD)


def test_what_could_never_be_set_up_may_be_the_candidates_fault(lost):
    lost.touch()
    with Bench(faults.FACTORY) as bench, pytest.raises(CallFailed, match="no CUDA-capable"):
        bench.verify(SPEC, GOOD)


def test_a_second_attempt_to_set_up_may_succeed(lost, monkeypatch):
    """The memory of a process that was killed may be taken for a moment longer."""
    with Bench(faults.FACTORY) as bench:
        bench.prepare(SPEC)
        bench._worker.kill()
        lost.touch()
        real = bench._worker.kill
        monkeypatch.setattr(bench._worker, "kill", lambda: (lost.unlink(missing_ok=True), real())[1])
        assert bench.verify(SPEC, GOOD) is None


def ends_while_it_is_closed(worker, before_close):
    """Close ``worker``, once ``before_close`` says so, while another thread calls it."""
    errors = []

    def call():
        try:
            worker.call("child", os.devnull, timeout=60)
        except channel.WorkerDied as error:
            errors.append(str(error))

    caller, start = threading.Thread(target=call), time.monotonic()
    caller.start()
    before_close()
    closer = threading.Thread(target=worker.close)
    closer.start()
    return caller, closer, errors, start


def test_a_close_that_comes_just_before_the_caller_waits_ends_its_call(monkeypatch):
    worker = Worker("faults:Echo")
    worker.call("echo", 1, timeout=60)
    at_select, go_on = threading.Event(), threading.Event()

    class Late(channel.selectors.DefaultSelector):
        def select(self, timeout=None):
            at_select.set()
            go_on.wait(20)
            return super().select(timeout)

    monkeypatch.setattr(channel.selectors, "DefaultSelector", Late)
    process = worker._process
    caller, closer, errors, start = ends_while_it_is_closed(worker, at_select.wait)
    while process.poll() is None and time.monotonic() < start + 20:
        time.sleep(0.01)
    time.sleep(0.2)  # for a close that does not wait
    go_on.set()
    caller.join(20)
    closer.join(20)
    assert not caller.is_alive() and not closer.is_alive() and len(errors) == 1 and worker.pid is None


def test_a_close_that_comes_while_a_process_starts_leaves_none_behind(monkeypatch):
    worker, started, made = Worker("faults:Echo"), threading.Event(), []
    real = channel.subprocess.Popen

    def popen(*args, **options):
        made.append(real(*args, **options))
        started.set()
        time.sleep(0.3)  # close comes here
        return made[0]

    monkeypatch.setattr(channel.subprocess, "Popen", popen)
    caller, closer, errors, _ = ends_while_it_is_closed(worker, started.wait)
    caller.join(20)
    closer.join(20)
    assert not caller.is_alive() and not closer.is_alive() and errors == ["the run is over"]
    assert made[0].wait(20) < 0 and worker.pid is None


def test_processes_that_are_started_set_themselves_up_side_by_side():
    with Worker("faults:Slow", 1.5) as one, Worker("faults:Slow", 1.5) as two:
        for worker in (one, two):
            worker.start()
            worker.start()  # runs already
        pids, began = [one.pid, two.pid], time.monotonic()
        assert None not in pids
        time.sleep(3.0)  # a slow machine needs more, and then the calls wait
        assert [w.call("echo", 0, timeout=30)[1] for w in (one, two)] == pids
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("factory", [None, "faults:Echo", "no_such_module:make"])
def test_a_process_that_cannot_set_itself_up_says_so_in_the_first_call(factory):
    server = None if factory is None else ForkServer(factory)
    with Worker("faults:Echo", "fail", server=server) as worker:
        worker.start()
        with pytest.raises(CallFailed, match=r"could not start.*refused"):
            worker.call("echo", 0, timeout=30)
        assert worker.pid is None


def test_a_process_that_was_started_and_not_called_is_closed():
    worker = Worker("faults:Echo")
    worker.start()
    pid = worker.pid
    worker.close()
    assert gone(pid)
