"""The options of ``sparsek-tune bench``; what is wrong with them is said before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from sparsek_tune.bench.cases import DISTRIBUTIONS, PEERS, Case, cases

STDOUT = Path("-")
_POSITIVE = click.FloatRange(0, min_open=True)
_OLD, _NEW = click.Path(exists=True, dir_okay=False, path_type=Path), click.Path(path_type=Path)
_OPTIONS = [
    click.option(
        "--distribution", "distributions", multiple=True, type=click.Choice(DISTRIBUTIONS), default=("iid",),
        help="Scores: normal with deviation 3 (iid, the default), the same plus a slope of 1e-3, or those of a trained "
        "model; repeatable.",
    ),
    click.option(
        "--recorded", metavar="FILE", type=_OLD,
        help="Tensors for the distribution 'trained': examples/train_bytes.py --record.",
    ),
    click.option(
        "--peer", "peers", multiple=True, type=click.Choice((*PEERS, "none")),
        help="What to put beside, all by default; repeatable.",
    ),
    click.option("--backward/--no-backward", default=True, show_default=True, help="Time the backward pass too."),
    click.option("--seconds", type=_POSITIVE, default=0.5, show_default=True, help="At most for one timing."),
    click.option(
        "--peer-limit", type=_POSITIVE, default=3.0, show_default=True, metavar="SECONDS",
        help="A peer that takes longer for one call is skipped.",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random inputs."),
    click.option(
        "--json", "json_file", metavar="FILE", type=_NEW,
        help="Write one JSON document to FILE, anew after every case; - is stdout, in place of the tables.",
    ),
    click.option("--plot", "plot_file", metavar="FILE", type=_NEW, help="Draw the results (.png, .svg or .pdf)."),
    click.option(
        "--from", "sources", metavar="FILE", type=_OLD, multiple=True,
        help="Show and draw what --json wrote; repeatable: the cases of all files together. Needs no GPU.",
    ),
]  # fmt: skip


def bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All but those that other commands have too."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def cases_of(models: tuple[str, ...], texts: tuple[str, ...], distributions: tuple[str, ...]) -> list[Case]:
    """The cases that the options name."""
    try:
        return cases(models, texts, distributions)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--shape") from error


def check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """What would keep results from being written is found out before there are any."""
    from sparsek_tune.bench import plot, report

    for option, path in (("--json", json_file), ("--plot", plot_file)):
        if path is not None and not (option == "--json" and path == STDOUT):
            try:
                report.check_writable(path)
            except OSError as error:
                raise click.BadParameter(str(error), param_hint=option) from error
    if plot_file is not None:
        if plot_file.suffix not in plot.SUFFIXES:
            raise click.BadParameter(f"must end in {', '.join(plot.SUFFIXES)}: {plot_file}", param_hint="--plot")
        if why := plot.available():
            raise click.UsageError(f"--plot: {why}")


def recording(path: Path | None, wanted: Sequence[Case]) -> dict[str, Any] | None:
    """The tensors that were recorded; they fit every case that wants them."""
    trained = [case for case in wanted if case.distribution == "trained"]
    if trained and path is None:
        raise click.UsageError("--distribution trained needs --recorded FILE")
    if path is None:
        return None
    from sparsek_tune.bench.inputs import RecordingError, check_recorded, load

    try:
        found = load(path)
        for case in trained:
            check_recorded(found, case.shape)
    except RecordingError as error:
        raise click.BadParameter(str(error), param_hint="--recorded") from error
    return found


def earlier(paths: Sequence[Path]) -> dict[str, Any]:
    """The document that an earlier run wrote, or what several did on GPUs of one kind with the same software."""
    from sparsek_tune.bench import report

    try:
        return report.merge([report.read(path) for path in paths])
    except (ValueError, OSError) as error:
        raise click.BadParameter(str(error), param_hint="--from") from error
