"""What commands share: how they end, their JSON, the text files that they write."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click

from sparsek_tune import files

BROKEN, NO_GPU, DATABASE, NOTHING, INTERRUPTED = 1, 3, 4, 5, 130
STDIO = Path("-")
_SQLITE = b"SQLite format 3\0"
_COMPANIONS = ("-wal", "-shm", "-journal")

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")


class Fault(click.ClickException):
    """An error with its exit code. results: what a JSON document still has to say."""

    def __init__(self, message: str, code: int, **results: Any) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]
        self.results = results


def fault_of(error: BaseException) -> click.ClickException | None:
    """What a command ends with after ``error``; None where nobody has foreseen it."""
    from sparsek_tune.db.errors import DatabaseError, SnapshotError
    from sparsek_tune.tune.channel import MachineError

    if isinstance(error, SnapshotError):
        return Fault(str(error), BROKEN)
    if isinstance(error, DatabaseError):
        return Fault(str(error), DATABASE)
    if isinstance(error, MachineError):
        return Fault(f"{error}; what was measured is kept, the next run goes on from it", BROKEN)
    if isinstance(error, KeyboardInterrupt):
        return Fault("interrupted", INTERRUPTED)
    return error if isinstance(error, click.ClickException) else None


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors of database and machine and Ctrl-C into messages and exit codes; with --json, every error into a
    document too."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if (fault := fault_of(error)) is None:
                raise
        if kwargs.get("as_json") or kwargs.get("json_file") == STDIO:
            results = fault.results if isinstance(fault, Fault) else {}
            print_json(**results, error=fault.format_message(), exit_code=fault.exit_code)
        raise fault

    return run


def print_json(**document: Any) -> None:
    click.echo(json.dumps({"schema": 1, **document}, indent=2, allow_nan=False))


@contextmanager
def writing(file: Path) -> Iterator[TextIO]:
    """The argument FILE of a command as a text file, replaced as a whole; stdout where it is "-". Never a database."""
    if file == STDIO:
        yield sys.stdout
        return
    with told(file):
        check_no_database(file)
        with files.replacing(file) as out:
            yield out


def check_writable(file: Path) -> None:
    """What would keep a file from being written is found out before there is anything to write. Raises click's errors,
    Fault among them."""
    with told(file):
        check_no_database(file)
        files.check_writable(file)


def check_no_database(file: Path) -> None:
    """Raises BadParameter where ``file`` is a database, or belongs to one: what it has committed may be in its log
    alone."""
    real = file.resolve()
    for name in (real, *(Path(str(real).removesuffix(end)) for end in _COMPANIONS if real.name.endswith(end))):
        if is_database(name):
            what = "a database" if name == real else f"part of the database {name}"
            raise click.BadParameter(f"must not be a database, but {file} is {what}", param_hint="FILE")


@contextmanager
def told(file: Path, **results: Any) -> Iterator[None]:
    """An OSError within the block says that ``file`` cannot be written. results: as in Fault."""
    try:
        yield
    except OSError as error:
        raise Fault(f"{file} cannot be written: {error.strerror or error}", BROKEN, **results) from error


def is_database(file: Path) -> bool:
    """Whether it begins as an SQLite database does. Raises OSError."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_SQLITE)) == _SQLITE
