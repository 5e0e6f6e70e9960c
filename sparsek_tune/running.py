"""The command that tunes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsek_tune import options
from sparsek_tune.command import INTERRUPTED, NOTHING, Fault, guarded
from sparsek_tune.kernel_templates import FAMILIES
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.types import EFFORTS

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
@click.option("--budget", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Wall time of the run.")
@click.option(
    "--kernel", "kernels", multiple=True, type=click.Choice(FAMILIES),
    help="Tune this kernel alone, beside the others as stored or by default; repeatable [default: all].",
)  # fmt: skip
@options.target_option
@options.device_option
@options.storage_option
@click.option(
    "--json", "as_lines", is_flag=True,
    help="Print every event as it comes, one JSON document a line, instead of a table at the end. "
    "sparsek_tune/event.schema.json describes a line.",
)  # fmt: skip
@guarded
def run_command(
    models: tuple[str, ...], texts: tuple[str, ...], captures: tuple[Path, ...], effort: str, budget: float | None,
    kernels: tuple[str, ...], target: str | None, index: int | None, storage: Path | str | None, as_lines: bool,
) -> None:  # fmt: skip
    """Tune every kernel for the given shapes and store the winners.

    Goes on from what earlier runs measured; Ctrl-C keeps what was measured so far. Without a GPU, or with --target,
    candidates are cross-compiled, verified in Triton's interpreter and ranked by the cost model; such results are
    marked static and never replace a measured one.
    """
    from sparsek_tune.db.store import Store
    from sparsek_tune.events import EventLines

    with EventLines(sys.stdout if as_lines else None) as lines:
        problems = _problems(models, texts, captures)
        if target is not None and index is not None:
            raise click.UsageError("--target and --device exclude each other")
        device = options.target(target) if target else options.gpu(index) or options.target("cuda:90")
        if device.static:
            name = device.name.removeprefix("target ")
            click.echo(f"No GPU is used: static tuning for {name} (compiled and verified, not timed).", err=True)
        with Store(storage) as store:
            click.echo(f"{len(problems)} problem(s) on {device.name}; database {store.path}", err=True)
            lines.begin(store.path, device, effort, budget, problems)
            wanted = {"effort": effort, "budget": budget, "kernels": kernels or None}
            rows = _tune(problems, device, store, wanted, lines, live=not (as_lines and sys.stdout.isatty()))
        if not as_lines:
            _table(rows)
        if not rows:
            raise Fault("no kernel was tuned: the budget is too short", NOTHING)
        if all(row.config is None for row in rows):
            raise Fault("no kernel has a working config", NOTHING)


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


def _table(rows: Sequence[Row]) -> None:
    from sparsek_tune.display import table

    header = ("kernel", "problem", "default ms", "tuned ms", "speed-up", "tried", "infeasible", "wrong", "failed")
    table("", header, [
        (r.template, str(r.problem), r.default_ms, r.tuned_ms, r.speedup, r.tried, r.infeasible, r.wrong, r.failed)
        for r in rows
    ])  # fmt: skip


COMMANDS = (run_command,)
