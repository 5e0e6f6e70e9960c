"""Files that are there as a whole, or as they were before."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that stands at ``path`` when the block ends; until then, and on any error or kill, what stood there
    before. A link stays one; a pipe or a device is written as it is. Raises OSError."""
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    path, (handle, name) = _beside(path)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Raises OSError, saying why, where :func:`replacing` would fail. Leaves what is there as it is."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists():
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if not path.is_file():
            return
    _, (handle, name) = _beside(path)
    os.close(handle)
    os.unlink(name)


def _beside(path: Path) -> tuple[Path, tuple[int, str]]:
    """Where ``path`` leads to, and a new file in the same folder: descriptor and name."""
    path = Path(os.path.realpath(path))
    try:
        return path, tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # names the new file, which nobody asked for
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
