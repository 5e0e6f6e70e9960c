"""The commands that take what is stored from one database to another."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsek_tune import options
from sparsek_tune.command import BROKEN, STDIO, Fault, as_json_option, guarded, is_database, print_json, writing

if TYPE_CHECKING:
    from sparsek_tune.db.records import Record
    from sparsek_tune.db.transfer import Report

_FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
RECORDS = click.Path(path_type=Path, dir_okay=False, allow_dash=True, exists=True, readable=True)


class _Database(click.Path):
    """An existing file; no URL, which might have a password in it, is shown."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail("must be files: what a server holds comes by `export --storage` and `import`", param, ctx)
        return super().convert(value, param, ctx)


_DATABASE = _Database(path_type=Path, dir_okay=False, exists=True)


@click.command("export")
@click.argument("file", type=_FILE)
@options.storage_option
@guarded
def export_command(file: Path, storage: Path | str | None) -> None:
    """Write all that the database holds to FILE (- for stdout), to be shared: one JSON document a line.

    Every measurement with its GPU, software, kernel source, problem, config, protocol and run (command, host and
    process id among it), failed attempts too, and whether it is served. db/record.schema.json describes a line.
    """
    from sparsek_tune.db import records, transfer
    from sparsek_tune.db.store import Store

    with Store(storage, read_only=True) as store:
        found = transfer.export(store)
    with writing(file) as out:
        records.write(out, found)
    if file != STDIO:
        click.echo(f"{len(found)} records written to {file}", err=True)


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=RECORDS)
@options.storage_option
@as_json_option
@guarded
def import_command(files: tuple[Path, ...], storage: Path | str | None, as_json: bool) -> None:
    """Add the records of FILES (- for stdin), written by export, to the database; .gz and .xz files are unpacked.

    A file is checked as a whole before anything is written, and taken in one transaction. What is there already is
    passed over. Where two configs won the same problem, and neither race replaced the other, the one with better
    evidence is served (measured before static, then the higher speed-up over the default in its race) and the other
    reported; the order of files does not matter. Nothing is run; a config will be served only where this version's
    kernels allow it.
    """
    _take([(str(file), read_records(file)) for file in files], storage, as_json)


def read_records(file: Path) -> list[Record]:
    """The records of a file (stdin where it is "-"), checked as a whole. Raises RecordError or click's errors."""
    from sparsek_tune.db import records

    try:
        if file != STDIO and is_database(file):
            raise click.UsageError(f"{file} is a database, no file of records: `export` writes them, `merge` takes it")
        with click.open_file("-", encoding="utf-8") if file == STDIO else records.open_text(file) as opened:
            return records.read(opened, str(file))
    except OSError as error:
        raise Fault(f"{file} cannot be read: {error.strerror}", BROKEN) from error


@click.command("merge")
@click.argument("databases", nargs=-1, required=True, type=_DATABASE)
@options.storage_option
@as_json_option
@guarded
def merge_command(databases: tuple[Path, ...], storage: Path | str | None, as_json: bool) -> None:
    """Add all that other DATABASES hold to this one, by the rules of import. The others are only read."""
    _take([(str(path), _checked(path)) for path in databases], storage, as_json)


def _checked(path: Path) -> list[Record]:
    """The records of another database, by the same rules as those of a file: nothing worse gets in."""
    from sparsek_tune.db import records, transfer
    from sparsek_tune.db.errors import CorruptError
    from sparsek_tune.db.store import Store

    if path.stat().st_size and not is_database(path):
        raise CorruptError(f"{path} is not a SQLite database; a file of records is for `sparsek-tune import`")
    text = io.StringIO()
    with Store(path, read_only=True) as other:
        try:
            records.write(text, transfer.export(other))
        except (ValueError, TypeError) as error:
            raise CorruptError(f"the database {path} holds what it should not: {error}") from error
    text.seek(0)
    return records.read(text, f"the records of {path}")


@click.command("freeze")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@options.storage_option
@as_json_option
@guarded
def freeze_command(file: Path, storage: Path | str | None, as_json: bool) -> None:
    """Write a read-only snapshot of the database to FILE, to ship with a job: SPARSEK_TUNE_CACHE=FILE.

    Every process that reads it gets the same configs on the same kind of GPU. Prints its SHA-256. An existing FILE is
    never replaced.
    """
    from sparsek_tune.db import transfer
    from sparsek_tune.db.store import Store

    with Store(storage, read_only=True) as store:
        digest = transfer.snapshot(store, file)
    if as_json:
        print_json(file=str(file), sha256=digest)
    else:
        click.echo(f"{digest}  {file}")


def _take(found: list[tuple[str, list[Record]]], storage: Path | str | None, as_json: bool) -> None:
    """Add the records of each source to the database, and tell what came of it."""
    from sparsek_tune.db import transfer
    from sparsek_tune.db.store import Store
    from sparsek_tune.display import table

    with Store(storage) as store:
        reports = [(name, transfer.add(store, records)) for name, records in found]
    if as_json:
        print_json(sources=[{"source": name, **_document(report)} for name, report in reports])
        return
    table("", ("from", "added", "known", "served anew", "conflicts"), [
        (name, r.added, r.known, r.winners, len(r.conflicts)) for name, r in reports
    ])  # fmt: skip
    conflicts = [c for _, report in reports for c in report.conflicts]
    if conflicts:
        header = ("device", "kernel", "problem", "served", "speed-up", "not served", "speed-up")
        table(
            "Two configs won the same problem",
            header,
            [(c.device, c.template, str(c.problem), *c[3:]) for c in conflicts],
        )


def _document(report: Report) -> dict[str, Any]:
    conflicts = [{**c._asdict(), "problem": c.problem._asdict()} for c in report.conflicts]
    return {**report._asdict(), "conflicts": conflicts}


COMMANDS = (export_command, import_command, merge_command, freeze_command)
