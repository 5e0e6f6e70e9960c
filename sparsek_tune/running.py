"""The command that tunes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsek_tune import options
from sparsek_tune.command import DATABASE, INTERRUPTED, NO_GPU, NOTHING, Fault, guarded
from sparsek_tune.kernel_templates import FAMILIES
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.types import EFFORTS
from sparsek_tune.tune.worker import die_with_parent

if TYPE_CHECKING:
    from sparsek_tune.db.store import Store
    from sparsek_tune.events import EventLines
    from sparsek_tune.tune import Event, Row


@click.command("run")
@options.shape_options
@click.option(
    "--captured",
    "captures",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Problems that a program had (SPARSEK_TUNE_CAPTURE=FILE), most time first; repeatable.",
)
@click.option("--effort", type=click.Choice(list(EFFORTS)), default="default", show_default=True, help="Search length.")
@click.option(
    "--budget", type=options.Number(0, min_open=True), metavar="SECONDS",
    help="Wall time of the run; what has begun by then is finished, without a GPU one default, which can take minutes.",
)  # fmt: skip
@click.option(
    "--kernel", "kernels", multiple=True, type=click.Choice(FAMILIES),
    help="Tune this kernel alone, beside the others as stored or by default; repeatable [default: all].",
)  # fmt: skip
@options.target_option
@options.device_option
@options.storage_option
@click.option(
    "--gpus", metavar="all|I,J,...",
    help="Tune on all GPUs of this host, or on those with these indices, a process each [default: one GPU].",
)  # fmt: skip
@click.option(
    "--json", "as_lines", is_flag=True,
    help="Print every event as it comes, one JSON document a line, instead of a table at the end. "
    "sparsek_tune/event.schema.json describes a line.",
)  # fmt: skip
@guarded
def run_command(
    models: tuple[str, ...], texts: tuple[str, ...], captures: tuple[Path, ...], effort: str, budget: float | None,
    kernels: tuple[str, ...], target: str | None, index: int | None, storage: Path | str | None, gpus: str | None,
    as_lines: bool,
) -> None:  # fmt: skip
    """Tune every kernel for the given shapes and store the winners.

    Without --model, --shape and --captured: n=4096, n=16384, and n=4096 with 12 heads of size 64.

    Goes on from what earlier runs measured; Ctrl-C keeps what was measured so far. Without a GPU, or with --target,
    candidates are cross-compiled, verified in Triton's interpreter and ranked by the cost model; such results are
    marked static and never replace a measured one.

    Other processes may join: `sparsek-tune worker`. With --gpus, GPUs of one model work at one suite of problems, each
    model at one of its own.
    """
    from sparsek_tune.crew import Crew
    from sparsek_tune.db.store import Store
    from sparsek_tune.events import EventLines
    from sparsek_tune.tune import forkserver
    from sparsek_tune.tune.pool import default_jobs
    from sparsek_tune.tune.stage import FACTORY

    with EventLines(sys.stdout if as_lines else None) as lines:
        problems = _problems(models, texts, captures)
        forkserver.start_early(FACTORY)  # imports torch while this process does
        if target is not None and index is not None:
            raise click.UsageError("--target and --device exclude each other")
        if gpus is not None and (target is not None or index is not None):
            raise click.UsageError(f"--gpus and --{'target' if target else 'device'} exclude each other")
        crew: Crew | None = None
        found, env = options.gpus(gpus) if gpus is not None else {}, dict(os.environ)
        if found:
            first, device = next(iter(found.items()))
            options.hide_others(first)  # from the workers of this process
        else:
            device = options.target(target) if target else options.gpu(index) or options.target("cuda:90")
        if device.static:
            name = device.name.removeprefix("target ")
            click.echo(f"No GPU is used: static tuning for {name} (compiled and verified, not timed).", err=True)
        with Store(storage) as store:
            click.echo(f"{len(problems)} problem(s) on {device.name}; database {store.path}", err=True)
            lines.begin(store.path, device, effort, budget, problems)
            wanted: dict[str, Any] = {"effort": effort, "budget": budget, "kernels": kernels or None}
            if len(found) > 1:
                wanted["jobs"] = default_jobs(len(found))
                others = {i: d for i, d in found.items() if i != first}
                wanted["crew"] = crew = Crew(device, others, str(store.where), wanted["jobs"], env)
            rows = _tune(problems, device, store, wanted, lines, live=not (as_lines and sys.stdout.isatty()))
        outcomes = {"": rows} | {f" on {d.name}": theirs for d, theirs in (crew.others.items() if crew else ())}
        for where, tuned in outcomes.items() if not as_lines else ():
            if tuned:
                _table(tuned, where.strip())
        if device.static and rows and not as_lines:
            served = f"`sparsek-tune resolve --target {device.name.removeprefix('target ')}` what is served"
            click.echo(f"`sparsek-tune show` lists the configs, {served}.", err=True)
        for where, tuned in outcomes.items():
            if not tuned:
                reason = "its processes have ended" if where else "the budget is too short"
                raise Fault(f"no kernel was tuned{where}: {reason}", NOTHING)
            if all(row.config is None for row in tuned):
                raise Fault(f"no kernel has a working config{where}", NOTHING)


@click.command("worker")
@options.storage_option
@options.target_option
@options.device_option
@click.option(
    "--wait", type=options.Number(0), default=0.0, metavar="SECONDS", help="Wait so long for runs to join.",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(1), metavar="N", help="Processes that compile [default: by CPUs and memory]."
)
@click.option("--suite", hidden=True)
@click.option("--json", "as_lines", is_flag=True, help="Print every event as it comes, as `run` does.")
@guarded
def worker_command(
    storage: Path | str | None, target: str | None, index: int | None, wait: float, jobs: int | None, suite: str | None,
    as_lines: bool,
) -> None:  # fmt: skip
    """Join runs of others that tune on the same model of GPU with the same kernels, until none is left.

    Takes problems that wait, and helps with searches where none does; what it measures is in the database of the run.
    It may be killed at any time.
    """
    from sparsek_tune.db.store import Store
    from sparsek_tune.display import progress
    from sparsek_tune.events import EventLines
    from sparsek_tune.tune import forkserver, join
    from sparsek_tune.tune.stage import FACTORY
    from sparsek_tune.tune.studies import StudiesError

    if suite is not None:
        die_with_parent()
        forkserver.start_early(FACTORY)  # there is work
    with EventLines(sys.stdout if as_lines else None) as lines:
        if target is not None and index is not None:
            raise click.UsageError("--target and --device exclude each other")
        device = options.target(target) if target else options.gpu(index)
        if device is None:
            raise Fault("there is no GPU here: name one with --target, such as --target cuda:90", NO_GPU)
        if not wait:  # a run to join has made its database: a name that is misspelt makes none
            with Store(storage, read_only=True):
                pass
        with Store(storage) as store, progress(not (as_lines and sys.stdout.isatty())) as show:
            click.echo(f"{device.name}; database {store.path}", err=True)
            lines.begin(store.path, device, "", None, [])

            def tell(event: Event) -> None:
                lines.show(event)
                show(event)

            try:
                joined = join(store, device, wait=wait, suite=suite, on_event=tell, jobs=jobs)
            except StudiesError as error:
                raise Fault(str(error), DATABASE) from error
        if joined == 0:
            raise Fault("there is no run to join: none tunes on this device with these kernels", NOTHING)


def _tune(
    problems: Sequence[Problem], device: Device, store: Store, wanted: Mapping[str, Any], lines: EventLines, live: bool
) -> list[Row]:
    """Tune, and tell of it. live: a display that moves may be on the terminal."""
    from sparsek_tune.display import progress
    from sparsek_tune.tune import tune

    try:
        with progress(live) as show:

            def tell(event: Event) -> None:
                lines.show(event)
                show(event)

            return tune(problems, device, store, on_event=tell, **wanted)
    except KeyboardInterrupt:
        raise Fault("interrupted: what was measured is kept, the next run goes on from it", INTERRUPTED) from None


def _problems(models: tuple[str, ...], texts: tuple[str, ...], captures: tuple[Path, ...]) -> list[Problem]:
    """What was captured, most time first, then the shapes that are named; the default shape where there is nothing."""
    from sparsek_tune import captured

    try:
        found = captured.merged(map(captured.read, captures))
    except (ValueError, OSError) as error:
        raise click.BadParameter(str(error), param_hint="--captured") from error
    if captures and not found:
        raise click.BadParameter("nothing was captured in " + ", ".join(map(str, captures)), param_hint="--captured")
    named = [s.problem for s in options.shapes(models, texts)] if models or texts or not captures else []
    if not found:
        return list(dict.fromkeys(named))
    from sparsek_tune.tune.static import busiest_first

    return list(dict.fromkeys([*busiest_first(found), *named]))


def _table(rows: Sequence[Row], title: str = "") -> None:
    from sparsek_tune.display import table

    header = ("kernel", "problem", "default ms", "tuned ms", "speed-up", "tried", "infeasible", "wrong", "failed")
    table(title, header, [
        (r.template, str(r.problem), r.default_ms, r.tuned_ms, r.speedup, r.tried, r.infeasible, r.wrong, r.failed)
        for r in rows
    ])  # fmt: skip


COMMANDS = (run_command, worker_command)
