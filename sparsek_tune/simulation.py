"""The command that replays search strategies over sweeps."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsek_tune import options
from sparsek_tune.command import NOTHING, Fault, as_json_option, guarded, print_json, told
from sparsek_tune.kernel_templates import FAMILIES
from sparsek_tune.sharing import RECORDS, read_records

if TYPE_CHECKING:
    from sparsek_tune.simulate.landscape import Landscape
    from sparsek_tune.simulate.run import Settings

_PACKAGES = ("optuna", "scipy", "torch", "cmaes", "helion")
# Spelled out: strategies.STRATEGIES would load optuna for --help.
STRATEGIES = (
    "tpe",
    "gp",
    "cma-es",
    "random",
    "coordinate",
    "descent-tpe",
    "exhaustive",
    "static",
    "helion-pattern",
    "helion-lfbo",
    "helion-de",
)
_EARLIER = click.Path(path_type=Path, dir_okay=False, exists=True, readable=True)


@click.command("simulate")
@click.argument("files", nargs=-1, type=RECORDS)
@click.option(
    "--strategy", "names", multiple=True, type=click.Choice(STRATEGIES), metavar="NAME",
    help="A strategy to replay; repeatable [default: all whose packages are installed]. One of: "
    f"{', '.join(STRATEGIES)}.",
)  # fmt: skip
@click.option(
    "--kernel", "kernels", multiple=True, metavar="NAME", type=click.Choice(FAMILIES),
    help=f"A kernel to look at alone; repeatable. One of: {', '.join(FAMILIES)}.",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=20, show_default=True, help="Replays of each.")
@click.option(
    "--trials", type=click.IntRange(1), default=100, show_default=True,
    help="Measurements of a replay at most; exhaustive takes all.",
)  # fmt: skip
@click.option("--ahead", type=click.IntRange(1), default=18, show_default=True, help="Configs in flight at most.")
@click.option(
    "--start", type=click.Choice(("cold", "warm", "blind")), default="cold", show_default=True,
    help="What a search looks at first: the default config, also the winners at other problems, or nothing.",
)  # fmt: skip
@click.option("--partial", is_flag=True, help="Take sweeps of parts of a space too, as if there were no more configs.")
@click.option("--jobs", type=click.IntRange(1), help="Processes that replay [default: one for each CPU].")
@click.option(
    "--from", "earlier", multiple=True, metavar="JSON", type=_EARLIER,
    help="Show what --json printed earlier, beside what is replayed now; repeatable.",
)  # fmt: skip
@options.plot_option("Draw best found against measurements and seconds to this file")
@as_json_option
@guarded
def simulate_command(
    files: tuple[Path, ...], names: tuple[str, ...], kernels: tuple[str, ...], seeds: int, trials: int,
    ahead: int, start: str, partial: bool, jobs: int | None, earlier: tuple[Path, ...], plot_file: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Replay search strategies over the sweeps of FILES: records as export writes them, - for stdin.

    A sweep says what every config of a kernel takes, so it needs no GPU to learn what a search would have found, after
    how many measurements and seconds. The seconds are those of a model of the tuner's processes; what a strategy thinks
    is measured. No complete sweep in FILES: exit code 5.
    """
    from sparsek_tune.simulate import plot, table
    from sparsek_tune.simulate.results import summary
    from sparsek_tune.simulate.run import Settings

    if not files and not earlier:
        raise click.UsageError("name a file of records, or an earlier result with --from")
    options.check_plot(plot_file, "simulate")
    names = _installed(names)
    document = _merged([_read(file) for file in earlier])
    if files:
        found = _landscapes(files, kernels, partial)
        _simulate(document, found, names, Settings(seeds, trials, ahead, start), jobs or os.cpu_count() or 1)
    document["summary"] = summary(document["results"])
    if plot_file is not None:
        with told(plot_file, **document):
            plot.draw(document, plot_file)
    if as_json:
        print_json(**document)
    else:
        table.show(document)


def _installed(names: tuple[str, ...]) -> tuple[str, ...]:
    """The strategies to replay. Raises UsageError for one that is named and whose packages are missing."""
    from sparsek_tune.simulate.strategies import missing_packages

    for name in names:
        if missing := missing_packages(name):
            raise click.UsageError(f"--strategy {name} needs what is not installed: pip install {' '.join(missing)}")
    return names or tuple(name for name in STRATEGIES if not missing_packages(name))


def _landscapes(files: Sequence[Path], kernels: Sequence[str], partial: bool) -> list[Landscape]:
    from sparsek_tune.report import evidence
    from sparsek_tune.simulate.landscape import landscapes

    found, left_out = landscapes(evidence.gpus([record for file in files for record in read_records(file)]))
    kept = []
    for landscape in found:
        if kernels and landscape.kernel.name not in kernels:
            continue
        if landscape.complete or partial:
            kept.append(landscape)
        else:
            left_out.append(f"{landscape}: {len(landscape.outcomes)} of {landscape.space} configs (--partial takes it)")
    for why in left_out:
        click.echo(f"left out: {why}", err=True)
    if not kept:
        raise Fault("there is no complete sweep of a kernel in " + ", ".join(map(str, files)), NOTHING)
    return kept


def _simulate(
    document: dict[str, Any], found: Sequence[Landscape], names: Sequence[str], settings: Settings, jobs: int
) -> None:
    from sparsek_tune.simulate.pruning import pruning
    from sparsek_tune.simulate.run import replays

    total = len(names) * len(found)
    for done, entry in enumerate(replays(found, names, settings, jobs), 1):
        click.echo(f"{done} of {total}: {entry['strategy']} at {entry['kernel']}", err=True)
        document["results"].append(entry)
    document["landscapes"] += [p for p in map(pruning, found) if p not in document["landscapes"]]
    document["versions"] |= {name: v for name in _PACKAGES if (v := _version(name))}


def _merged(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {"versions": {}, "landscapes": [], "results": []}
    for document in documents:
        merged["versions"] |= document["versions"]
        merged["results"] += document["results"]
        merged["landscapes"] += [p for p in document["landscapes"] if p not in merged["landscapes"]]
    return merged


def _read(file: Path) -> dict[str, Any]:
    """What --json printed."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not (isinstance(document, dict) and {"versions", "landscapes", "results"} <= document.keys()):
            raise ValueError("it has no results")
        return document
    except (ValueError, OSError) as error:
        raise click.BadParameter(
            f"must be what simulate --json printed, but {file}: {error}", param_hint="--from"
        ) from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


COMMANDS = (simulate_command,)
