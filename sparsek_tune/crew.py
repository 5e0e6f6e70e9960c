"""The processes of `run --gpus`: a `sparsek-tune worker` for every GPU but the first, at a suite of its own model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import IO, TYPE_CHECKING, Any

from sparsek_tune.events import event_of
from sparsek_tune.options import STORAGE
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.types import Event, OnEvent, Row

if TYPE_CHECKING:
    from sparsek_tune.tune.suite import Suite

COMMAND = [sys.executable, "-m", "sparsek_tune.cli"]
_LAST = 60.0  # seconds that a worker has for what it is at when its suite is over
_STOP = 15.0  # seconds to end after an interrupt


class Crew:
    """Call it with the suite of ``first``, the device of this process, and what takes events: a context in which the
    others work, too.

    gpus: index to device, without this process's; storage: the database; env: of the workers. A worker that cannot
    start, or dies, costs a message: the others do its work. others: in the end, the rows of suites of other models.
    """

    def __init__(self, first: Device, gpus: Mapping[int, Device], storage: str, jobs: int, env: Mapping[str, str]):
        self._first, self._gpus, self._jobs = first, gpus, jobs
        self._env = {**env, STORAGE: storage}
        self.others: dict[Device, list[Row]] = {}
        self._hands: list[_Hand] = []

    def __call__(self, suite: Suite, emit: OnEvent) -> Crew:
        self._emit, self._suite = emit, suite
        return self

    def __enter__(self) -> Crew:
        self._suites = {self._first: self._suite}
        for index, device in self._gpus.items():
            if device not in self._suites:
                self._suites[device] = self._suite.sister(self._first, device)
            arguments = ["--suite", self._suites[device].name, "--device", str(index)]
            command = [*COMMAND, "worker", *arguments, "--jobs", str(self._jobs), "--json"]
            show = self._emit if device == self._first else self._quietly(device)
            try:
                self._hands.append(_Hand(index, command, self._env, show, self._say))
            except OSError as error:
                self._say(f"the process of GPU {index} cannot be started: {error}; the run goes on without it")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        limit = _STOP if kind is not None else _LAST if len(self._suites) == 1 else None
        others = {device: suite for device, suite in self._suites.items() if device != self._first}
        with ExitStack() as stack:  # an interrupt may come while another model's processes are waited for
            for suite in others.values():
                stack.callback(suite.withdraw)
            for hand in self._hands:
                stack.callback(hand.close)
                if kind is not None:
                    hand.interrupt()
            for hand in self._hands:
                hand.wait(limit)
            self.others = {device: suite.rows() for device, suite in others.items()}

    def _say(self, message: str) -> None:
        self._emit(_note(message))

    def _quietly(self, device: Device) -> OnEvent:
        """Another model's searches have the names of this one's."""

        def show(event: Event) -> None:
            if event.row is not None:
                self._emit(_note(f"{device.name}: {event.row.template} [{event.row.problem}] is done"))

        return show


class _Hand:
    """One worker process, and a thread that reads its lines."""

    def __init__(
        self, index: int, command: list[str], env: Mapping[str, str], show: OnEvent, say: Callable[[str], None]
    ) -> None:
        self._index, self._show, self._say = index, show, say
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, text=True,
            start_new_session=True,  # Ctrl-C reaches the parent alone
        )  # fmt: skip
        self._stopped = False
        self._thread = threading.Thread(target=self._read, name=f"GPU {index}", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        self._stopped = True
        self._process.send_signal(signal.SIGINT)

    def wait(self, limit: float | None) -> None:
        """Until the process ends, or is killed after ``limit`` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(limit)
        self.close()

    def close(self) -> None:
        """Kill the process if it has not ended."""
        if self._process.poll() is None:
            self._stopped = True
            self._process.kill()
            self._process.wait()
        self._thread.join(5.0)
        self._log.close()

    def _read(self) -> None:
        error = ""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                document: dict[str, Any] = json.loads(line)
                if document["event"] == "end":
                    error = document["error"] or ""
                elif (event := event_of(document)) is not None:
                    self._show(event)
            except (ValueError, KeyError, TypeError):
                continue  # cut off, as its writer was killed
        code = self._process.wait()
        if code != 0 and not self._stopped:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else error or self._last_words()
            self._say(f"the process of GPU {self._index} ended ({how}); the run goes on without it")

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"exit status {self._process.returncode}"


def _note(message: str) -> Event:
    return Event("note", "crew", Problem("", 0, 0, "", 0, 0, 0, 0), 0, 0, None, message)
