"""The command line. Data goes to stdout, progress and messages to stderr.

Exit codes: 0 ok, 1 something is broken (doctor, run, bench) or could not be written, 2 usage, 3 no GPU where one is
required, 4 database, 5 nothing usable found, 130 interrupted. Heavy imports are inside the commands, so that ``--help``
is quick.
"""

from __future__ import annotations

import functools
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsek_tune import __version__, completion, options, reporting, running, sharing, simulation
from sparsek_tune.bench.arguments import bench_options
from sparsek_tune.bench.cases import PEERS, Case
from sparsek_tune.command import BROKEN, INTERRUPTED, NO_GPU, Fault, as_json_option, guarded, print_json
from sparsek_tune.options import device_option, shape_options, target_option
from sparsek_tune.problem import Device

if TYPE_CHECKING:
    from sparsek_tune.db.store import Summary
    from sparsek_tune.dispatch import Candidate, Plan


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
    """Say which config each kernel gets for the given shapes on this GPU (or --target), its grade and why."""
    from sparsek_tune import dispatch

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
@as_json_option
def doctor(as_json: bool) -> None:
    """Look at GPU, driver, versions and database; say what is missing and how to mend it.

    Exits with 1 if something is broken. That there is no GPU, or no database yet, is not.
    """
    from sparsek_tune.display import table
    from sparsek_tune.doctor import examine

    findings = examine()
    if as_json:
        print_json(findings=[f._asdict() for f in findings])
    else:
        table("", ("subject", "state", "found", "to mend"), [(f.subject, f.level, f.found, f.mend) for f in findings])
    if any(f.level == "broken" for f in findings):
        sys.exit(BROKEN)


@main.command()
@shape_options
@bench_options
@device_option
@guarded
def bench(
    models: tuple[str, ...], texts: tuple[str, ...], distributions: tuple[str, ...], recorded: Path | None,
    peers: tuple[str, ...], backward: bool, seconds: float, peer_limit: float, seed: int, index: int | None,
    json_file: Path | None, plot_file: Path | None, sources: tuple[Path, ...],
) -> None:  # fmt: skip
    """Time every stage and the whole operator beside dense and sparse attention of others.

    Results are checked against the reference before they are timed. Cold L2, medians, 95 % intervals. Without --shape:
    lengths from 4096 to 131072 with k=512 and k=1024. A peer that is missing or fails is reported and left out.
    """
    from sparsek_tune.bench import arguments, plot, report

    arguments.check_files(json_file, plot_file)
    if sources and (json_file or models or texts or recorded or peers):
        raise click.UsageError("--from takes --plot alone: it measures nothing")
    if sources:
        document, wrong = arguments.earlier(sources), []
    else:
        wanted = arguments.cases_of(models, texts, distributions)
        settings = {"seconds": seconds, "peer_limit": peer_limit, "seed": seed, "backward": backward}
        settings["recorded"] = arguments.recording(recorded, wanted)
        device = options.gpu(index)
        if device is None:
            raise Fault("there is no GPU here, and the benchmark needs one", NO_GPU)
        document = _measure(wanted, device, peers or PEERS, settings, json_file)
        wrong = report.failures(document)
    if json_file != arguments.STDOUT:
        report.show(document)
    if plot_file is not None:
        plot.draw(document, plot_file)
    if wrong:
        raise Fault("failed: " + "; ".join(wrong), BROKEN, **document)
    if json_file == arguments.STDOUT:
        print_json(**document)


def _measure(
    wanted: Sequence[Case], device: Device, peers: Sequence[str], settings: Mapping[str, Any], json_file: Path | None
) -> dict[str, Any]:
    """The document of a run; kept up to date in the file, if one is named."""
    from sparsek_tune.bench import arguments, machine, report
    from sparsek_tune.bench.peers import BY_NAME
    from sparsek_tune.bench.run import Bench, Settings

    file = None if json_file == arguments.STDOUT else json_file
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


for command in (*running.COMMANDS, *sharing.COMMANDS, *reporting.COMMANDS, *simulation.COMMANDS, *completion.COMMANDS):
    main.add_command(command)


if __name__ == "__main__":
    main()
