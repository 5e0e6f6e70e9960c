"""The command that times our kernels beside others; what is wrong with its options is said before it begins."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from sparsek_tune import options
from sparsek_tune.bench.cases import DISTRIBUTIONS, PEERS, Case, cases
from sparsek_tune.command import BROKEN, INTERRUPTED, NO_GPU, STDIO, Fault, check_writable, guarded, print_json, told
from sparsek_tune.problem import Device

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
    click.option(
        "--seconds", type=options.Number(0, min_open=True), default=0.5, show_default=True,
        help="At most for one timing.",
    ),
    click.option(
        "--peer-limit", type=options.Number(0, min_open=True), default=3.0, show_default=True, metavar="SECONDS",
        help="A peer that takes longer for one call is skipped.",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random inputs."),
    click.option(
        "--json", "json_file", metavar="FILE", type=_NEW,
        help="Write one JSON document to FILE, anew after every case; - is stdout, in place of the tables.",
    ),
    options.plot_option("Draw the results to this file"),
    click.option(
        "--from", "sources", metavar="FILE", type=_OLD, multiple=True,
        help="Show and draw what --json wrote; repeatable: the cases of all files together. Needs no GPU.",
    ),
]  # fmt: skip


def _bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All but those that other commands have too."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _cases(models: tuple[str, ...], texts: tuple[str, ...], distributions: tuple[str, ...]) -> list[Case]:
    """The cases that the options name."""
    try:
        return cases(models, texts, distributions)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--shape") from error


def _recording(path: Path | None, wanted: Sequence[Case]) -> dict[str, Any] | None:
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


def _earlier(paths: Sequence[Path]) -> dict[str, Any]:
    """The document that an earlier run wrote, or what several did on GPUs of one kind with the same software."""
    from sparsek_tune.bench import report

    try:
        return report.merge([report.read(path) for path in paths])
    except (ValueError, OSError) as error:
        raise click.BadParameter(str(error), param_hint="--from") from error


@click.command("bench")
@options.shape_options
@_bench_options
@options.device_option
@guarded
def bench_command(
    models: tuple[str, ...], texts: tuple[str, ...], distributions: tuple[str, ...], recorded: Path | None,
    peers: tuple[str, ...], backward: bool, seconds: float, peer_limit: float, seed: int, index: int | None,
    json_file: Path | None, plot_file: Path | None, sources: tuple[Path, ...],
) -> None:  # fmt: skip
    """Time every stage and the whole operator beside dense and sparse attention of others.

    Results are checked against the reference before they are timed. Cold L2, medians, 95 % intervals. Without --shape:
    lengths from 4096 to 131072 with k=512 and k=1024. A peer that is missing or fails is reported and left out.
    """
    from sparsek_tune.bench import plot, report

    if json_file not in (None, STDIO):
        check_writable(json_file)
    options.check_plot(plot_file, "bench")
    if sources and (given := sorted(options.given() - {"--from", "--plot"})):
        raise click.UsageError(f"--from takes --plot alone, as it measures nothing, but there is {', '.join(given)}")
    if sources:
        document, wrong = _earlier(sources), []
    else:
        wanted = _cases(models, texts, distributions)
        settings = {"seconds": seconds, "peer_limit": peer_limit, "seed": seed, "backward": backward}
        settings["recorded"] = _recording(recorded, wanted)
        device = options.gpu(index)
        if device is None:
            raise Fault("there is no GPU here, and the benchmark needs one", NO_GPU)
        document = _measure(wanted, device, peers or PEERS, settings, json_file)
        wrong = report.failures(document)
    if json_file != STDIO:
        report.show(document)
    if plot_file is not None:
        with told(plot_file, **document):
            plot.draw(document, plot_file)
    if wrong:
        raise Fault("failed: " + "; ".join(wrong), BROKEN, **document)
    if json_file == STDIO:
        print_json(**document)


def _measure(
    wanted: Sequence[Case], device: Device, peers: Sequence[str], settings: Mapping[str, Any], json_file: Path | None
) -> dict[str, Any]:
    """The document of a run; kept up to date in the file, if one is named."""
    from sparsek_tune.bench import machine, report
    from sparsek_tune.bench.peers import BY_NAME
    from sparsek_tune.bench.run import Bench, Settings

    file = None if json_file == STDIO else json_file
    save = functools.partial(report.write, file) if file else lambda document: None
    run = Bench(machine.Cuda(device.l2), device, Settings(**settings), functools.partial(click.echo, err=True), save)
    command = shlex.join(["sparsek-tune", *sys.argv[1:]])
    try:
        return run.run(wanted, [BY_NAME[name] for name in dict.fromkeys(peers) if name != "none"], command)
    except KeyboardInterrupt:
        kept = f": what was measured is in {file}" if file else ""
        raise Fault(f"interrupted{kept}", INTERRUPTED, **run.document) from None
    except OSError as error:
        raise Fault(f"{file} cannot be written any more: {error}", BROKEN, **run.document) from error


COMMANDS = (bench_command,)
