"""The command line. Data goes to stdout, progress and messages to stderr.

Exit codes: 0 ok, 1 something is broken (doctor, run, bench) or could not be written, 2 usage, 3 no GPU where one is
required, 4 database, 5 nothing usable found, 130 interrupted. Heavy imports are inside the commands, so that ``--help``
is quick.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsek_tune import __version__, benching, completion, options, reporting, running, sharing, simulation
from sparsek_tune.command import BROKEN, DATABASE, NO_GPU, Fault, as_json_option, guarded, print_json
from sparsek_tune.options import device_option, shape_options, target_option

if TYPE_CHECKING:
    from sparsek_tune.db.store import Summary
    from sparsek_tune.dispatch import Candidate, Plan


class _Program(click.Group):
    """Says that the output cannot be written, as to a full disk; a reader that is gone is click's."""

    def main(self, *arguments: Any, **extra: Any) -> Any:
        try:
            try:
                return super().main(*arguments, **extra)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except OSError as error:
            if error.filename is not None:  # no stream's
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again at its end
            click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            sys.exit(BROKEN)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sparsek-tune")
def main() -> None:
    """Tune SparseK attention kernels for this GPU, and look at what was found.

    Tuned configs are kept in one SQLite file: $SPARSEK_TUNE_CACHE, else $XDG_CACHE_HOME/sparsek-tune/cache.db, else
    ~/.cache/sparsek-tune/cache.db. Programs that import sparsek_tune.ops are served from it.

    Exit codes: 0 ok, 1 something is broken (doctor, run, bench) or could not be written, 2 usage, 3 no GPU where one is
    required, 4 database, 5 nothing usable found, 130 interrupted.
    """


@main.command()
@options.storage_option
@as_json_option
@guarded
def show(storage: Path | str | None, as_json: bool) -> None:
    """List what the database holds: per GPU, kernel and problem the attempts and the winner."""
    from sparsek_tune.db.store import Store
    from sparsek_tune.display import table

    with Store(storage, read_only=True) as store:
        found, path = store.summary(), str(store.path)
    if as_json:
        print_json(database=path, entries=[_summary(s) for s in found])
        return
    click.echo(f"database {path}", err=True)
    if not found:
        click.echo("nothing stored yet: run `sparsek-tune run`", err=True)
        return
    header = ("device", "kernel", "problem", "attempts", "default ms", "tuned ms", "winner")
    table("", header, [
        (s.device.name, s.template, str(s.problem), _counts(s.counts),
         *((w.default_ms, w.tuned_ms, w.config) if (w := s.winner) else (None, None, None)))
        for s in found
    ])  # fmt: skip


def _counts(counts: Mapping[str, int]) -> str:
    return " ".join(f"{status}:{n}" for status, n in counts.items())


def _summary(s: Summary) -> dict[str, Any]:
    w = s.winner
    winner = w and {
        "config": json.loads(w.config), "default_ms": w.default_ms, "tuned_ms": w.tuned_ms, "static": w.static,
        "created_at": w.created_at,
    }  # fmt: skip
    return {
        "device": s.device.as_dict(), "template": s.template, "source_hash": s.source_hash,
        "problem": s.problem._asdict(), "attempts": dict(s.counts), "winner": winner,
    }  # fmt: skip


@main.command()
@shape_options
@target_option
@device_option
@options.storage_option
@click.option("--explain", is_flag=True, help="List every stored config of each kernel, and why it does not serve.")
@as_json_option
@guarded
def resolve(
    models: tuple[str, ...], texts: tuple[str, ...], target: str | None, index: int | None, storage: Path | str | None,
    explain: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say which config each kernel gets for the given shapes on this GPU (or --target), its grade and why.

    A cache that cannot be read is told and passed over, as by programs; a --storage that cannot ends with exit code 4.
    """
    from sparsek_tune import dispatch
    from sparsek_tune.db import reader

    wanted = options.shapes(models, texts)
    if target is not None and index is not None:
        raise click.UsageError("--target and --device exclude each other")
    device = options.target(target) if target else options.gpu(index)
    if device is None:
        raise Fault("there is no GPU here: name one with --target, such as --target cuda:90", NO_GPU)
    problems = dict.fromkeys(s.problem for s in wanted)
    with options.as_file(storage) as file:
        plans = [
            (dispatch.resolve(p, device, file), dispatch.explain(p, device, file) if explain else {}) for p in problems
        ]
        stored = reader.load(file, device.kind, device.cc)
        if stored.broken and storage is not None:
            raise Fault(stored.reason, DATABASE)
        if stored.reason:
            click.echo(stored.reason, err=True)
    if as_json:
        print_json(device=device.as_dict(), plans=[_plan_document(*plan) for plan in plans])
        return
    for plan, candidates in plans:
        _plan_table(plan, candidates)


def _plan_document(plan: Plan, candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, Any]:
    kernels = {
        name: {"config": r.config, "grade": r.grade, "reason": r.reason, "distance": r.distance}
        for name, r in plan.items()
    }
    for name, found in candidates.items():
        kernels[name]["candidates"] = [
            {
                "config": c.entry.config, "device": c.entry.device.as_dict(), "problem": c.entry.problem._asdict(),
                "grade": c.grade, "distance": c.distance if math.isfinite(c.distance) else None, "refused": c.refused,
            } for c in found
        ]  # fmt: skip
    return {"problem": plan.problem._asdict(), "kernels": kernels}


def _plan_table(plan: Plan, candidates: Mapping[str, Sequence[Candidate]]) -> None:
    from sparsek_tune.display import table

    where = f"{plan.problem} on {plan.device.name}"
    rows = [(name, r.grade, r.config.key, r.reason) for name, r in plan.items()]
    table(where, ("kernel", "grade", "config", "reason"), rows)
    if candidates:
        header = ("kernel", "config", "device", "problem", "distance", "verdict")
        table(f"Stored configs for {where}", header, [
            (name, c.entry.config, c.entry.device.name, str(c.entry.problem), c.distance, _verdict(c, place))
            for name, found in candidates.items() for place, c in enumerate(found)
        ])  # fmt: skip


def _verdict(candidate: Candidate, place: int) -> str:
    if candidate.refused:
        return candidate.refused
    return f"{candidate.grade}: served" if place == 0 else f"{candidate.grade}: a better one serves"


@main.command()
@options.storage_option
@as_json_option
def doctor(storage: Path | str | None, as_json: bool) -> None:
    """Look at GPU, driver, versions and database; say what is missing and how to mend it.

    Exits with 1 if something is broken. That there is no GPU, or no database yet, is not.
    """
    from sparsek_tune.display import table
    from sparsek_tune.doctor import examine

    findings = examine(storage)
    if as_json:
        print_json(findings=[f._asdict() for f in findings])
    else:
        table("", ("subject", "state", "found", "to mend"), [(f.subject, f.level, f.found, f.mend) for f in findings])
    if any(f.level == "broken" for f in findings):
        sys.exit(BROKEN)


for module in (running, benching, sharing, reporting, simulation, completion):
    for command in module.COMMANDS:
        main.add_command(command)


if __name__ == "__main__":
    main()
