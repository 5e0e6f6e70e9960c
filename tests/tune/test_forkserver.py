"""Processes that are forked: they are as those that are started, and whatever becomes of the server a call works."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time

import pytest
from test_channel import gone

from sparsek_tune.tune import forkserver
from sparsek_tune.tune.channel import MachineError, Worker, WorkerDied
from sparsek_tune.tune.forkserver import ForkServer


@pytest.fixture
def server():
    server = ForkServer("faults:Echo")
    yield server
    server.close()


def worker(server, *arguments, **options):
    return Worker("faults:Echo", *arguments, server=server, **options)


def test_what_the_server_has_imported_is_there_and_nothing_is_shared(server, monkeypatch):
    monkeypatch.setenv("FAULTS_SEEN", "before")
    with worker(server, env={"FAULTS_OWN": "1"}) as one, worker(server) as two:
        assert one.call("environment", "FAULTS_OWN", timeout=30) == "1"
        monkeypatch.setenv("FAULTS_SEEN", "after")  # the server has the old one
        assert two.call("environment", "FAULTS_OWN", timeout=30) is None
        assert two.call("environment", "FAULTS_SEEN", timeout=30) == "after"
        assert one.call("environment", "FAULTS_SEEN", timeout=30) == "before"
        assert one.call("modules", timeout=30) >= {"faults", "sparsek_tune.tune.worker"}
        assert one.pid != two.pid and os.getsid(one.pid) == one.pid
        logs = [w.call("descriptors", timeout=30) for w in (one, two)]
        assert [log["0"] for log in logs] == ["/dev/null"] * 2
        assert all(log["1"] == log["2"] for log in logs) and logs[0]["1"] != logs[1]["1"]


def test_forking_takes_no_time(server):
    with worker(server) as first:
        first.call("echo", 0, timeout=60)
        start = time.monotonic()
        with worker(server) as second:
            second.call("echo", 0, timeout=60)
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize(
    ("method", "words"), [("exit", r"exit status 3\): last words"), ("fault", "killed by SIGSEGV")]
)
def test_it_is_said_how_a_process_ended(server, method, words):
    with worker(server) as one:
        with pytest.raises(WorkerDied, match=words):
            one.call(method, timeout=30)
        assert one.call("echo", 4, timeout=30)[0] == 4


def test_a_server_that_dies_takes_its_processes_along_and_the_next_call_starts_another(server):
    with worker(server) as one, worker(server) as two:
        pids = [w.call("echo", 0, timeout=30)[1] for w in (one, two)]
        os.kill(server._process.pid, signal.SIGKILL)
        assert all(gone(pid) for pid in pids)
        assert [w.call("echo", 5, timeout=60)[0] for w in (one, two)] == [5, 5]
        assert not {one.pid, two.pid} & set(pids)


def test_a_call_during_which_the_server_dies_is_done_again(server):
    """It was not the call; a call that kills its own process is not done again."""
    with worker(server) as one:
        pid, results = one.call("echo", 0, timeout=30)[1], []
        caller = threading.Thread(target=lambda: results.append(one.call("slow_echo", 1.0, timeout=60)))
        caller.start()
        time.sleep(0.3)
        os.kill(server._process.pid, signal.SIGKILL)
        caller.join(60)
        assert results and results[0] not in (pid, os.getpid())
        with pytest.raises(WorkerDied):
            one.call("fault", timeout=30)


def test_nothing_is_left_when_a_server_is_closed(server):
    one = worker(server)
    pid = one.call("echo", 0, timeout=30)[1]
    process = server._process
    server.close()
    assert gone(pid) and process.returncode is not None
    with pytest.raises(MachineError, match=r"cannot be started.*closed"):
        one.call("echo", 0, timeout=30)
    one.close()


def test_a_close_ends_a_start_that_waits():
    """The server still imports, and would for long."""
    server = ForkServer("faults_slow_import:Echo")
    one, errors = worker(server), []

    def call():
        try:
            one.call("echo", 0, timeout=60)
        except (MachineError, WorkerDied) as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    while server._process is None:
        time.sleep(0.01)
    start = time.monotonic()
    server.close()
    one.close()
    caller.join(10)
    assert not caller.is_alive() and len(errors) == 1 and time.monotonic() - start < 10


def test_an_interrupt_during_a_request_leaves_no_answer_to_the_next(server, monkeypatch):
    def interrupted(data, files):
        socket.send_fds(server._socket, [forkserver.HEADER.pack(len(data))], files)
        server._socket.sendall(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_exchange", interrupted)
    with worker(server) as one:
        with pytest.raises(KeyboardInterrupt):
            one.call("echo", 0, timeout=30)
        monkeypatch.undo()
        assert one.call("echo", 1, timeout=60)[1] == one.pid


def test_an_interrupt_during_a_look_at_a_process_leaves_no_answer_to_the_next_request(server, monkeypatch):
    def interrupted(data, files):
        server._socket.sendall(forkserver.HEADER.pack(len(data)) + data)
        raise KeyboardInterrupt

    with worker(server) as one, worker(server) as two:
        one.call("echo", 0, timeout=30)
        monkeypatch.setattr(server, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one._process.poll()
        monkeypatch.undo()
        assert two.call("echo", 1, timeout=60)[1] == two.pid
        assert one.call("echo", 1, timeout=60)[1] == one.pid  # its process died with the server


def test_a_process_that_cannot_be_forked_is_the_machines_fault(server, monkeypatch):
    monkeypatch.setattr(server, "_exchange", lambda data, files: forkserver.FAILED + errno.EAGAIN)
    with worker(server) as one, pytest.raises(MachineError, match=r"cannot be started.*temporarily"):
        one.call("echo", 0, timeout=30)


def test_a_server_started_early_is_taken_once():
    forkserver.start_early("faults:Echo")
    forkserver.start_early("faults:Echo")
    first, second, other = (forkserver.take(f) for f in ("faults:Echo", "faults:Echo", "faults:make"))
    assert first._process is not None and second._process is None and other._process is None
    first.close()


def test_descriptors_do_not_pile_up(server):
    with worker(server) as one:
        one.call("echo", 0, timeout=60)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            one.kill()
            one.call("echo", 0, timeout=60)
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(os.listdir(f"/proc/{server._process.pid}/fd")) < 10
        assert sys.platform != "linux" or len(zombies(server._process.pid)) == 0


def zombies(parent):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as f:
                state, ppid = f.read().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(ppid) == parent and state == "Z":
            found.append(pid)
    return found
