"""A process that has imported what workers need, and forks them: each is there after milliseconds, not after the
seconds that torch and triton take.

The other end is :mod:`sparsek_tune.tune.forked`.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import Any, BinaryIO

START_SECONDS = 180.0  # a cold import of torch
HEADER = struct.Struct("<Q")  # length of a request; the descriptors that it hands over come with it
ANSWER = struct.Struct("<q")  # a process id, an exit status, or what follows
RUNNING, UNKNOWN = 1 << 32, 1 << 33  # no exit status yet, or not a process of this server
FAILED = 1 << 40  # plus an errno


def python_path() -> str:
    """For a child's PYTHONPATH, so that it imports what this process would."""
    return os.pathsep.join(os.path.abspath(p) for p in sys.path)


class ForkServer:
    """The parent's end, for several threads. The process starts with the first use, and again where it has died, with
    all that it had forked. factory: "module:function", of which it imports the module."""

    def __init__(self, factory: str) -> None:
        self.factory = factory
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.ready = False  # it has imported all, and may have forked
        self._closed = False

    def start(self) -> None:
        """Start the process, and do not wait for it."""
        with self._lock:
            if self._process is None and not self._closed:
                self._launch()

    def popen(self, service: str, env: Mapping[str, str], log: BinaryIO) -> Forked:
        """A new worker process for ``service`` with the environment ``env``, what it prints in ``log``; as
        ``subprocess.Popen`` gives it, in a session of its own. Raises OSError."""
        with ExitStack() as theirs, ExitStack() as ours:

            def pipe() -> tuple[int, int]:
                read, write = os.pipe()
                return read, write

            stdin, to_stdin = pipe()
            theirs.callback(os.close, stdin)
            to_child = ours.enter_context(os.fdopen(to_stdin, "wb"))
            from_stdout, stdout = pipe()
            theirs.callback(os.close, stdout)
            from_child = ours.enter_context(os.fdopen(from_stdout, "rb"))
            server, pid = self._request(("fork", service, dict(env), os.getcwd()), [stdin, stdout, log.fileno()])
            forked = Forked(self, server, pid, to_child, from_child)
            ours.pop_all()
        return forked

    def status(self, pid: int, server: subprocess.Popen[bytes]) -> int | None:
        """The exit status of a process that ``server``, the one of then, forked; None while it runs. What died with its
        server was killed, and raises OSError."""
        with self._lock:
            if self._process is not server:
                raise OSError(errno.ESRCH, "the fork server died")
            try:
                answer = self._exchange(pickle.dumps(("wait", pid)), [])
            except BaseException:
                self._end()
                raise
        return None if answer == RUNNING else -signal.SIGKILL if answer == UNKNOWN else answer

    def close(self) -> None:
        """Kill the process, and with it whatever it has forked and still runs; no new one is started after this."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()  # who waits for an answer sees the end
        with self._lock:
            self._end()

    def _request(self, message: Any, files: Sequence[int]) -> tuple[subprocess.Popen[bytes], int]:
        """The answer, and the process that gave it."""
        data = pickle.dumps(message)
        with self._lock:
            for again in (True, False):
                if self._closed:
                    raise OSError(errno.ESHUTDOWN, "the fork server is closed")
                process = self._process or self._launch()
                if self._closed:  # since then
                    self._end()
                    raise OSError(errno.ESHUTDOWN, "the fork server is closed")
                try:
                    answer = self._exchange(data, files)
                    break
                except OSError:
                    self._end()
                    if not again:
                        raise
                except BaseException:  # an interrupt: the answer would be taken for that to the next request
                    self._end()
                    raise
        if answer >= FAILED:
            raise OSError(answer - FAILED, os.strerror(answer - FAILED))
        return process, answer

    def _exchange(self, data: bytes, files: Sequence[int]) -> int:
        socket.send_fds(self._socket, [HEADER.pack(len(data))], files)
        self._socket.sendall(data)
        answer = self._socket.recv(ANSWER.size, socket.MSG_WAITALL)
        if len(answer) < ANSWER.size:
            raise OSError(errno.ECONNRESET, "the fork server died")
        self.ready = True
        return ANSWER.unpack(answer)[0]

    def _launch(self) -> subprocess.Popen[bytes]:
        module = self.factory.partition(":")[0]
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(START_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sparsek_tune.tune.forked", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": python_path(), "TRITON_INTERPRET": "0"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches the parent alone
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._socket.close()
            process.kill()
            process.wait()


class Forked:
    """As much of ``subprocess.Popen`` as a worker's parent needs. lost: it died with its server."""

    def __init__(
        self, server: ForkServer, process: subprocess.Popen[bytes], pid: int, stdin: BinaryIO, stdout: BinaryIO
    ) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self.lost = False
        self._server, self._process, self._lock = server, process, Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                try:
                    self.returncode = self._server.status(self.pid, self._process)
                except OSError:
                    self.returncode, self.lost = -signal.SIGKILL, True
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Raises subprocess.TimeoutExpired."""
        limit = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.005)
        return status


_early: list[ForkServer] = []


def start_early(factory: str) -> None:
    """Start a server now, for whoever will :func:`take` it: until then it imports."""
    if not any(server.factory == factory for server in _early):
        _early.append(ForkServer(factory))
        _early[-1].start()


def take(factory: str) -> ForkServer:
    """The server that was started early for ``factory``, or a new one."""
    found = next((server for server in _early if server.factory == factory), None)
    if found is None:
        return ForkServer(factory)
    _early.remove(found)
    return found
