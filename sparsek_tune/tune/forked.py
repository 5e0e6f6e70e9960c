"""The other end of a fork server: ``python -m sparsek_tune.tune.forked MODULE FD`` imports the module, calls its
``preload()`` if it has one, and serves the socket FD.

It has no thread and no CUDA context, so that whatever it forks may have both.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import signal
import socket
import sys
import traceback
from contextlib import suppress
from typing import Any

from sparsek_tune.tune import worker
from sparsek_tune.tune.forkserver import ANSWER, FAILED, HEADER, RUNNING, UNKNOWN


def main() -> None:
    worker.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = socket.socket(fileno=int(sys.argv[2]))
    with suppress(BaseException):  # a worker that imports it again will say what is wrong
        getattr(importlib.import_module(sys.argv[1]), "preload", lambda: None)()
    gc.freeze()  # what the workers share
    while (request := _receive(server)) is not None:
        message, files = request
        if message[0] == "fork":
            _fork(server, message[1], message[2], message[3], files)
        else:
            server.sendall(ANSWER.pack(_status(message[1])))


def _receive(server: socket.socket) -> tuple[Any, list[int]] | None:
    """A request and the descriptors with it, None where the parent is gone."""
    header, files, _, _ = socket.recv_fds(server, HEADER.size, 3)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    data = server.recv(size, socket.MSG_WAITALL)
    return (pickle.loads(data), files) if len(data) == size else None


def _fork(server: socket.socket, service: str, env: dict[str, str], folder: str, files: list[int]) -> None:
    """A process that answers with its id as soon as it has its own session, for it is killed by that."""
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        server.sendall(ANSWER.pack(FAILED + (error.errno or 0)))
        child = -1
    if child == 0:
        try:
            os.setsid()
            server.sendall(ANSWER.pack(os.getpid()))
            server.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            os.environ.clear()
            os.environ.update(env)
            with suppress(OSError):
                os.chdir(folder)
            worker.main(service, parent)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    for file in files:
        os.close(file)


def _status(pid: int) -> int:
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return UNKNOWN
    return os.waitstatus_to_exitcode(status) if ended else RUNNING


if __name__ == "__main__":
    main()
