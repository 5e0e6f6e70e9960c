"""The parent's end of a worker process: start it, call it with a wall timeout, kill it, start it again.

A worker is ``python -m sparsek_tune.tune.worker MODULE:CLASS``: it builds one service object and runs the methods that
it is asked for. What a candidate does to it (hang, crash, print) costs that candidate alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from sparsek_tune.tune.forkserver import Forked, ForkServer, python_path

HEADER = struct.Struct("<Q")
STARTUP_SECONDS = 180.0  # a cold import of torch and the creation of a CUDA context
DEATH_SECONDS = 30.0  # a killed process is gone at once, unless it hangs in the GPU's driver
MACHINE = "machine"  # in place of a status: it was not the candidate


class WorkerError(Exception):
    """A call did not give a result. ``status``: the measurement status that the candidate gets."""

    status = "runtime"


class MachineError(Exception):
    """Whatever the candidate, it could not have gone well: a full disk, a process that cannot be started, a GPU that is
    gone. Ends the run, for every further candidate would be taken for a bad one."""


class WorkerTimeout(WorkerError):
    """The call ran past its wall time; the worker was killed."""

    status = "timeout"


class WorkerDied(WorkerError):
    """The worker process ended during the call (a signal, exit, or a broken protocol)."""


class CallFailed(WorkerError):
    """The method raised. ``status`` and ``fatal`` (the process was replaced: its GPU state cannot be trusted) are the
    worker's judgement."""

    def __init__(self, message: str, status: str, fatal: bool) -> None:
        super().__init__(message)
        self.status, self.fatal = status, fatal


class Worker:
    """One worker process, started on the first call or by :meth:`start`. Not for use by two threads at once.

    service: "module:attribute" that the worker calls once, with ``arguments`` (picklable), to get the object whose
    methods are called. env: environment variables on top of this process's. server: forks the process, instead of its
    being started from nothing.
    """

    def __init__(
        self, service: str, *arguments: Any, env: Mapping[str, str] | None = None, server: ForkServer | None = None
    ) -> None:
        self._service, self._arguments, self._env, self._server = service, arguments, dict(env or {}), server
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._closed = self._serving = self._lost = False
        self._busy = threading.Lock()  # held during a call

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process id, None while no process runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process now, and do not wait for it: whether it could set itself up shows in the first call. During
        a call there is nothing to do."""
        if self._busy.acquire(blocking=False):
            try:
                if self._process is None:
                    self._start()
            except WorkerError:
                pass
            finally:
                self._busy.release()

    def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        """The result of ``method(*arguments)`` in the worker. timeout: seconds, on top of the start of a new process.

        Raises WorkerTimeout, WorkerDied or CallFailed; after the first two, and a fatal CallFailed, the next call gets
        a new process. Raises MachineError.
        """
        with self._busy:
            try:
                return self._call(method, arguments, timeout)
            except WorkerDied:
                if not self._lost or self._closed:
                    raise
                return self._call(method, arguments, timeout)  # it died with its server: not by this call

    def _call(self, method: str, arguments: tuple[Any, ...], timeout: float) -> Any:
        if self._process is not None and self._process.poll() is not None:  # died since it answered: not by this call
            self.kill()
        if self._process is None:
            self._start()
        if not self._serving:
            self._wait_for_start()
        try:
            self._send((method, arguments))
            status, value = self._receive(time.monotonic() + timeout)
        except BaseException:
            self.kill()
            raise
        if status == "ok":
            return value
        message, kind, fatal = value
        if fatal or kind == MACHINE:
            self.kill()
        if kind == MACHINE:
            raise MachineError(message)
        raise CallFailed(message, kind, fatal)

    def close(self) -> None:
        """Kill the process; no new one is started after this. A call on another thread ends with WorkerDied."""
        self._closed = True
        if (process := self._process) is not None:
            _kill_group(process)
        # What reads the pipe sees its end, and only then is it closed: closed under a selector, it would never wake it.
        with self._busy:
            self.kill()

    def kill(self) -> None:
        """Kill the process with everything it started (its process group). Not while another thread calls."""
        process, self._process = self._process, None
        self._serving = self._lost = False
        if process is None:
            return
        _kill_group(process)
        self._lost = isinstance(process, Forked) and process.lost
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEATH_SECONDS)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._log.close()

    def _start(self) -> None:
        if self._closed:
            raise WorkerDied("the run is over")
        try:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
            self._process = self._launch()
        except OSError as error:
            raise MachineError(f"a worker process cannot be started: {error}") from error
        if self._closed:  # meanwhile, by another thread, which did not see this process
            self.kill()
            raise WorkerDied("the run is over")
        try:
            self._send(self._arguments)
        except BaseException:
            self.kill()
            raise

    def _launch(self) -> subprocess.Popen[bytes] | Forked:
        env = {**os.environ, "PYTHONPATH": python_path(), **self._env}
        if self._server is not None:
            return self._server.popen(self._service, env, self._log)
        return subprocess.Popen(
            # -P: the user's working directory must not shadow a module.
            [sys.executable, "-P", "-m", "sparsek_tune.tune.worker", self._service],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            start_new_session=True,  # Ctrl-C reaches the parent alone; killpg reaches ptxas too
        )

    def _wait_for_start(self) -> None:
        try:
            status, value = self._receive(time.monotonic() + STARTUP_SECONDS)
        except BaseException:
            self.kill()
            raise
        self._serving = status == "ok"
        if not self._serving:
            self.kill()
            message = f"the worker could not start: {value[0]}"
            raise MachineError(message) if value[1] == MACHINE else CallFailed(message, value[1], True)

    def _send(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        data = pickle.dumps(message)
        try:
            self._process.stdin.write(HEADER.pack(len(data)) + data)
            self._process.stdin.flush()
        except OSError:
            raise WorkerDied(self._obituary()) from None

    def _receive(self, deadline: float) -> tuple[str, Any]:
        (size,) = HEADER.unpack(self._read(HEADER.size, deadline))
        return pickle.loads(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while len(data) < size:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise WorkerTimeout("it ran past its wall time")
                chunk = os.read(descriptor, min(size - len(data), 1 << 16))
                if not chunk:
                    raise WorkerDied(self._obituary())
                data += chunk
        return bytes(data)

    def _obituary(self) -> str:
        """How the process ended, and the last line that it wrote."""
        assert self._process is not None
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the worker died ({how})" + (f": {lines[-1][:300]}" if lines else "")


def _kill_group(process: subprocess.Popen[bytes] | Forked) -> None:
    if process.poll() is None:  # else its number may be another's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
