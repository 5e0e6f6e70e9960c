"""The end of the processes of `run --gpus`, without GPUs or kernels: stand-ins that sleep."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sparsek_tune import crew
from sparsek_tune.crew import Crew
from sparsek_tune.problem import target_device

SLEEPER = "import time; print(flush=True); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(600)"
ONE = target_device("cuda:90")
OTHER = dataclasses.replace(ONE, name="another model")


class Suite:
    """Stands for a suite."""

    def __init__(self, name="suite"):
        self.name, self.sisters, self.withdrawn = name, [], False

    def sister(self, device, other):
        self.sisters.append(Suite(other.name))
        return self.sisters[-1]

    def rows(self):
        return []

    def withdraw(self):
        self.withdrawn = True


def make(monkeypatch, program, gpus):
    monkeypatch.setattr(crew, "COMMAND", [sys.executable, "-c", program])
    return Crew(ONE, gpus, "nowhere", 1, os.environ)


def pids(crew):
    return [hand._process.pid for hand in crew._hands]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_storage_shows_in_no_command_line(monkeypatch):
    """With its password, to everybody on the host."""
    hands = make(monkeypatch, SLEEPER, {1: ONE})
    with hands(Suite(), lambda event: None):
        (pid,) = pids(hands)
        command, environment = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        os.kill(pid, signal.SIGKILL)
    assert b"nowhere" not in command and b"SPARSEK_TUNE_STORAGE=nowhere" in environment


def test_an_interrupt_while_other_models_are_waited_for_leaves_nothing_behind(monkeypatch):
    suite, events = Suite(), []
    hands = make(monkeypatch, SLEEPER, {1: OTHER, 2: OTHER})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt), hands(suite, events.append):
            timer.start()
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert all(gone(pid) for pid in pids(hands)) and events == []
    assert [s.withdrawn for s in suite.sisters] == [True] and not suite.withdrawn


def test_all_are_interrupted_before_one_is_waited_for(monkeypatch):
    monkeypatch.setattr(crew, "_STOP", 1.0)
    hands = make(monkeypatch, STUBBORN, dict.fromkeys(range(1, 4), ONE))
    sent, real = [], crew._Hand.interrupt
    monkeypatch.setattr(crew._Hand, "interrupt", lambda self: sent.append(self) or real(self))
    waited, wait = [], crew._Hand.wait
    monkeypatch.setattr(crew._Hand, "wait", lambda self, limit: waited.append(len(sent)) or wait(self, limit))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), hands(Suite(), print):
        raise KeyboardInterrupt
    assert waited == [3, 3, 3] and time.monotonic() - start < 10 and all(gone(pid) for pid in pids(hands))


def test_a_process_that_ends_by_itself_is_told_of(monkeypatch):
    events = []
    with make(monkeypatch, "raise SystemExit('no such GPU')", {1: ONE})(Suite(), events.append):
        pass
    assert [event.message for event in events] == [
        "the process of GPU 1 ended (no such GPU); the run goes on without it"
    ]


def test_processes_of_another_model_are_waited_for_however_long_their_work_takes(monkeypatch):
    monkeypatch.setattr(crew, "_LAST", 0.1)
    hands = make(monkeypatch, "import time; time.sleep(1.0)", {1: OTHER})
    with hands(Suite(), print):
        pass
    assert [hand._process.returncode for hand in hands._hands] == [0]


def test_who_ends_by_an_interrupt_is_not_told_of(monkeypatch, tmp_path):
    ready, events = tmp_path / "ready", []
    program = (
        f"import pathlib, time\ntry:\n    pathlib.Path({str(ready)!r}).touch(); time.sleep(600)\n"
        "except KeyboardInterrupt:\n    raise SystemExit(130)"
    )
    hands = make(monkeypatch, program, {1: ONE})
    with pytest.raises(KeyboardInterrupt), hands(Suite(), events.append):
        end = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert [hand._process.returncode for hand in hands._hands] == [130] and events == []
