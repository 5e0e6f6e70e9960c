"""The command that shows what is stored as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsek_tune import options
from sparsek_tune.command import NOTHING, STDIO, Fault, guarded, writing
from sparsek_tune.sharing import RECORDS, read_records

if TYPE_CHECKING:
    from sparsek_tune.report.evidence import Gpu


@click.command("report")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option(
    "--from", "source", metavar="RECORDS", type=RECORDS,
    help="Show the records of a file that export wrote (- for stdin) in place of the database's.",
)  # fmt: skip
@options.storage_option
@guarded
def report_command(file: Path, source: Path | None, storage: Path | str | None) -> None:
    """Write one HTML page about all that the database holds to FILE (- for stdout).

    Winners, search curves, parameter importances, rooflines and failures, for each GPU. The page is one file, loads
    nothing from anywhere, and opens in any browser. Needs no GPU. Nothing stored: exit code 5.
    """
    from sparsek_tune.bench import plot

    if why := plot.available("report"):
        raise click.UsageError(why)
    if {"--from", "--storage"} <= options.given():
        raise click.UsageError("--from and --storage exclude each other")
    if source is not None and source != STDIO and file != STDIO and file.exists() and file.samefile(source):
        raise click.BadParameter(f"must not be the file of --from, but is {file}", param_hint="FILE")
    name, gpus = _stored(storage) if source is None else _exported(source)
    if not gpus:
        raise Fault(f"nothing is stored in {name}: run `sparsek-tune run`", NOTHING)
    from sparsek_tune.report import page

    text = page.render(gpus, name)
    with writing(file) as out:
        out.write(text)
    if file != STDIO:
        click.echo(f"{sum(len(s.attempts) for g in gpus for s in g.searches)} measurements shown in {file}", err=True)


def _exported(source: Path) -> tuple[str, list[Gpu]]:
    from sparsek_tune.report import evidence

    return "stdin" if source == STDIO else source.name, evidence.gpus(read_records(source))


def _stored(storage: Path | str | None) -> tuple[str, list[Gpu]]:
    from sparsek_tune.db import transfer
    from sparsek_tune.db.errors import CorruptError
    from sparsek_tune.db.store import Store
    from sparsek_tune.report import evidence

    with Store(storage, read_only=True) as store:
        try:
            return Path(store.path).name, evidence.gpus(transfer.export(store))
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptError(f"the database {store.path} holds what it should not: {error}") from error


COMMANDS = (report_command,)
