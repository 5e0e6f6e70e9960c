"""Winners measured again, on the GPU that they are of; one JSON document a line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click

from sparsek_tune import dispatch, options
from sparsek_tune.command import NO_GPU, Fault, guarded
from sparsek_tune.db import reader
from sparsek_tune.db.store import Store
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.presets import MODELS, shapes
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.bench import Bench
from sparsek_tune.tune.forkserver import ForkServer
from sparsek_tune.tune.pool import CompilePool
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.tuner import tune
from sparsek_tune.tune.types import Spec

SECONDS = 1.0  # of a race or a measurement
ROUNDS = 3  # of the presets' measurements, in turn


class Race(NamedTuple):
    spec: Spec
    picks: dict[str, Config]  # by where they come from; the default among them


def again(device: Device, sources: Iterable[str]) -> list[Race]:
    entries = {source: winners_of(device, source) for source in sources}
    found = []
    for name, key in dict.fromkeys((e.template, e.problem) for stored in entries.values() for e in stored):
        # What the kernel does not depend on is blank.
        filled = {"dtype": key.dtype or "bf16", "d": key.d or 128, "g": key.g or 4, "gate": key.gate or "kv"}
        problem = key._replace(**filled)
        picks = {
            Path(source).stem: Config.from_key(e.config)
            for source, stored in entries.items() for e in stored if (e.template, e.problem) == (name, key)
        }  # fmt: skip
        beside = served(problem, device, entries[next(s for s in entries if Path(s).stem in picks)])
        default = TEMPLATES[name].default(problem, device)
        found.append(Race(Spec(name, problem, device, {**beside, name: default}), {"default": default, **picks}))
    return found


def winners_of(device: Device, source: str) -> Sequence[reader.Entry]:
    if source == "shipped":
        return reader.load_shipped(device.kind, device.cc).entries
    with Store(source, read_only=True) as store:
        return store.winners()


def served(problem: Problem, device: Device, entries: Sequence[reader.Entry]) -> dict[str, Config]:
    """Of every template what a dispatcher that has ``entries`` alone serves."""
    found = {}
    for t in TEMPLATES.values():
        best = next((c for c in dispatch.candidates(t, problem, device, entries) if not c.refused), None)
        found[t.name] = t.default(problem, device) if best is None else Config.from_key(best.entry.config)
    return found


def presets(
    device: Device, models: Iterable[str], seconds: float
) -> Iterator[tuple[str, dict[str, dict[str, Config]]]]:
    shipped = reader.load_shipped(device.kind, device.cc).entries
    for model in models:
        problem = shapes((model,), ())[0].problem
        with tempfile.TemporaryDirectory() as folder, hidden(), Store(Path(folder) / "tuned.db") as store:
            tune([problem], device, store, budget=seconds)
            winners = store.winners()
        sets = {"default": served(problem, device, ())}
        sets |= {"shipped": served(problem, device, shipped), "tuned": served(problem, device, winners)}
        yield model, sets


@contextmanager
def hidden() -> Iterator[None]:
    """Within the block nothing is shipped."""
    real = reader.load_shipped
    reader.load_shipped = lambda *_: reader.Winners(())
    try:
        yield
    finally:
        reader.load_shipped = real


def run_races(races: list[Race], pool: CompilePool, bench: Bench) -> None:
    for race in races:
        for config in race.picks.values():
            for part in ("setup", "length"):
                pool.submit(race.spec, config, part)
    for race in races:
        for config in race.picks.values():
            pool.submit(race.spec, config).result()
        configs = list(dict.fromkeys(race.picks.values()))
        found = dict(zip(configs, bench.race(race.spec, configs, SECONDS, 0), strict=True))
        times = {name: [found[c].median, found[c].low, found[c].high] for name, c in race.picks.items()}
        show(kernel=race.spec.template, problem=race.spec.problem._asdict(), ms=times)


def run_preset(
    model: str, sets: Mapping[str, dict[str, Config]], device: Device, pool: CompilePool, bench: Bench
) -> None:
    """The schedule's template is timed with all that follows it; the threshold comes before."""
    problem = shapes((model,), ())[0].problem
    work = [(name, Spec(t, problem, device, s), s[t]) for name, s in sets.items() for t in ("threshold", "schedule")]
    for _, spec, config in work:
        pool.submit(spec, config, "setup").result()
        pool.submit(spec, config).result()
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for name, spec, config in work:
            found = bench.measure(spec, config, SECONDS, float("inf"))
            times.setdefault((name, spec.template), []).append(found.median)
    ms = {name: sum(median(times[name, t]) for t in ("threshold", "schedule")) for name in sets}
    configs = {name: {t: c.key for t, c in s.items()} for name, s in sets.items()}
    show(model=model, problem=problem._asdict(), ms=ms, shipped_of_tuned=ms["tuned"] / ms["shipped"], configs=configs)


def show(**document: object) -> None:
    print(json.dumps(document), flush=True)


@contextmanager
def tools() -> Iterator[tuple[Device, CompilePool, Bench]]:
    device = options.gpu(None)
    if device is None:
        raise Fault("there is no GPU here, and winners are measured on one", NO_GPU)
    with ExitStack() as stack:
        server = ForkServer(FACTORY)
        stack.callback(server.close)
        pool = stack.enter_context(CompilePool(FACTORY, timeout=300.0, server=server))
        yield device, pool, stack.enter_context(Bench(FACTORY, timeout=120.0, server=server))


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("again")
@click.argument("databases", nargs=-1)
@guarded
def again_command(databases: tuple[str, ...]) -> None:
    """Every winner of DATABASES ("shipped", the default: of what is shipped) against the default config and the other
    files' winners of the same kernel and problem, in one race, beside the first file's winners of the other kernels."""
    with tools() as (device, pool, bench):
        run_races(again(device, databases or ("shipped",)), pool, bench)


@main.command("presets")
@click.argument("models", nargs=-1, required=True, type=click.Choice(list(MODELS)))
@click.option("--seconds", type=options.Number(0, min_open=True), default=80.0, show_default=True, help="Of the run.")
@guarded
def presets_command(models: tuple[str, ...], seconds: float) -> None:
    """A call forward and backward with the default configs, with what is shipped, and with what a run finds that knows
    nothing of what is shipped."""
    with tools() as (device, pool, bench):
        for model, sets in presets(device, models, seconds):
            run_preset(model, sets, device, pool, bench)


if __name__ == "__main__":
    main()
