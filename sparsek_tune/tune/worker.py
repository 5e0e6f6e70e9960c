"""The child's end: ``python -m sparsek_tune.tune.worker MODULE:CLASS`` serves method calls over its stdin and stdout.

The service object comes from the command line and from the first message alone; the user's ``__main__`` is never run.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import pickle
import re
import signal
import subprocess
import sys
from functools import partial, partialmethod
from typing import Any, BinaryIO

from sparsek_tune.tune.channel import HEADER, MACHINE

# After one of these the CUDA context is lost or half dead: the process must go.
_STICKY = re.compile(
    r"illegal memory access|misaligned address|unspecified launch failure|illegal instruction|device-side assert"
    r"|invalid program counter|hardware stack error|illegal address|launch timed out|uncorrectable",
    re.IGNORECASE,
)
# No disk, no quota, no file descriptors: the next candidate would fare no better.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
_FULL = ("No space left on device", "Disk quota exceeded")  # as programs that were started (ptxas) say it
_PR_SET_PDEATHSIG = 1


def classify(error: BaseException) -> tuple[str, bool]:
    """(measurement status or MACHINE, whether the process must be replaced) for an exception of a candidate."""
    name, text = type(error).__name__, str(error)
    if (isinstance(error, OSError) and error.errno in _MACHINE) or any(words in text for words in _FULL):
        return MACHINE, True
    if name == "OutOfResources":
        return "infeasible", False
    if name in ("CompilationError", "CompileTimeAssertionFailure", "PTXASError", "UnsupportedLanguageConstruct"):
        return "compile", False
    if name == "MemoryCorrupted":
        return "wrong", True
    out_of_memory = isinstance(error, MemoryError) or name == "OutOfMemoryError" or "out of memory" in text
    return "runtime", out_of_memory or _STICKY.search(text) is not None


def main(name: str, parent: int) -> None:
    """Serve the service called ``name``. parent: the id of the process that started this one."""
    die_with_parent()
    if os.getppid() != parent:  # gone before it was asked
        return
    # The protocol gets private descriptors; whatever prints to stdout (ptxas prints whole programs) goes to the log.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    service = _answer(replies, lambda arguments: _load(name)(*arguments), _receive(requests), reply=False)
    while service is not None and (message := _receive(requests)) is not None:
        method, arguments = message
        _answer(replies, lambda a, m=method: getattr(service, m)(*a), arguments, reply=True)
        os.ftruncate(2, 0)  # keep the log to the current call
        os.lseek(2, 0, os.SEEK_SET)


def _answer(replies: BinaryIO, call: Any, arguments: Any, *, reply: bool) -> Any:
    """Run ``call(arguments)``, send the outcome (the value itself where ``reply``), return the value."""
    value = None
    try:
        value = call(arguments)
        data = pickle.dumps(("ok", value if reply else None))
    except Exception as error:  # every failure is the candidate's, and the parent decides
        status, fatal = classify(error)
        # Text only: a traceback would keep tensors alive and may not pickle.
        first = (str(error).strip() or repr(error)).splitlines()[0][:500]
        data = pickle.dumps(("error", (f"{type(error).__name__}: {first}", status, fatal)))
    replies.write(HEADER.pack(len(data)) + data)
    replies.flush()
    return value


def _receive(requests: BinaryIO) -> Any:
    header = requests.read(HEADER.size)
    return pickle.loads(requests.read(HEADER.unpack(header)[0])) if len(header) == HEADER.size else None


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent goes, however it goes; and so for what it starts (ptxas)."""
    if sys.platform == "linux":
        ask = partial(ctypes.PyDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
        ask()
        subprocess.Popen.__init__ = partialmethod(subprocess.Popen.__init__, preexec_fn=ask)  # type: ignore


if __name__ == "__main__":
    main(sys.argv[1], os.getppid())
