"""Tuning without a GPU: resources and the cost model decide, the interpreter has a veto, the store says static."""

from __future__ import annotations

import dataclasses
import time

import faults
import pytest

from sparsek_tune.db.store import Store
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config, Cost
from sparsek_tune.problem import Problem, target_device
from sparsek_tune.tune import EFFORTS, tune, types
from sparsek_tune.tune.bench import Bench
from sparsek_tune.tune.pool import CompilePool
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.static import resident_warps
from sparsek_tune.tune.tuner import tune as run
from sparsek_tune.tune.types import Kernel, Spec

TINY = types.Effort(4, 60.0, 0.01, 3, 0.01, 16, 3, timeout=20.0)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setitem(EFFORTS, "tiny", TINY)
    with Store(tmp_path / "cache.db") as store:
        yield store


def go(store, template, problems=(faults.PROBLEM,)):
    options = {"effort": "tiny", "target": "cuda:90", "factory": faults.FACTORY}
    return run(problems, None, store, templates={template.name: template}, **options)


def priced(price, **options):
    """A fake template with ``price(config)`` bytes."""
    t = faults.template(**options)
    cost = lambda config, problem: Cost(1.0, price(config))  # noqa: E731
    return type(t)(t.name, t.fields, t.space, t.default, t.check, cost, t.sources)


def test_the_cheapest_right_config_becomes_a_static_winner_without_times(store, monkeypatch):
    def price(config):
        return 1e9 / config["tile"] / (4 if config["fault"] != "none" else 1)

    parts, real = set(), CompilePool.submit

    def submit(self, spec, config, part="length", **options):
        parts.add(part)
        return real(self, spec, config, part, **options)

    monkeypatch.setattr(CompilePool, "submit", submit)

    t = priced(price, tiles=(16, 128), faults=("none", "wrong", "spills"))
    (row,) = go(store, t)
    assert row.config == Config(tile=128, fault="none")
    assert (row.default_ms, row.tuned_ms, row.speedup) == (None, None, None)
    assert row.tried == 12 and row.infeasible == 4 and row.wrong == 2
    (winner,) = store.winners()
    assert winner.static and winner.device.static and Config.from_key(winner.config) == row.config
    statuses = {r.result.status for r in store.measurements(target_device("cuda:90"), t, faults.PROBLEM)}
    assert statuses == {"static", "wrong", "infeasible"}
    assert parts == {"length"}  # the rest is what a GPU would run


def test_the_interpreter_may_take_longer_than_a_gpu(store, monkeypatch):
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, timeout=2.0))
    (row,) = go(store, faults.template(tiles=(32, 32), faults=("slow to verify",)))
    assert row.config == Config(tile=32, fault="slow to verify") and row.failed == 0


def test_the_default_stays_where_nothing_is_clearly_cheaper(store):
    (row,) = go(store, priced(lambda c: 1e9 * (0.95 if c["tile"] == 128 else 1.0), tiles=(16, 128)))
    assert row.config == Config(tile=32, fault="none")


def test_a_budget_that_is_spent_leaves_the_default_alone(store):
    t = priced(lambda c: 1e9 / c["tile"], tiles=(8, 4096), faults=("none", "compile hang"))
    options = {"effort": "tiny", "target": "cuda:90", "factory": faults.FACTORY, "jobs": 1}
    start = time.monotonic()
    (row,) = run([faults.PROBLEM], None, store, templates={t.name: t}, budget=2.0, **options)
    assert time.monotonic() - start < 15  # each hang takes 20 s
    assert row.config is not None and row.tried < 16
    (found,) = [
        r for r in store.measurements(target_device("cuda:90"), t, faults.PROBLEM) if r.result.status == "static"
    ]
    assert found.result.protocol["candidates"] == row.tried


def test_no_winner_where_nothing_is_right(store):
    (row,) = go(store, priced(lambda c: 1e9, tiles=(16, 32), faults=("wrong",)))
    assert row.config is None and store.winners() == []


def test_problems_with_one_small_problem_are_verified_once_and_the_second_run_does_nothing(store, monkeypatch):
    calls, real = [], Bench.verify
    monkeypatch.setattr(Bench, "verify", lambda self, *a: calls.append(a) or real(self, *a))
    t = priced(lambda c: 1e9, tiles=(32, 32))
    problems = [faults.PROBLEM._replace(n=n) for n in (1024, 4096)]
    rows = go(store, t, problems)
    assert len(rows) == 2 and len(calls) == 1 and len(store.winners()) == 2
    assert [r.config for r in go(store, t, problems)] == [r.config for r in rows] and len(calls) == 1


def test_more_effort_looks_again(store, monkeypatch):
    t = priced(lambda config: 1e9 / config["tile"], tiles=(16, 4096))
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, static_trials=2, static_finalists=1))
    few = go(store, t)[0]
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, static_trials=50, static_finalists=1))
    many = go(store, t)[0]
    assert few.tried == 2 and many.tried == 9 and many.config["tile"] == 4096
    assert go(store, t)[0].config == many.config


@pytest.mark.parametrize(
    ("kernel", "warps"),
    [
        (Kernel("k", 64, 0, 0, 4), 32),
        (Kernel("k", 255, 0, 0, 4), 8),
        (Kernel("k", 32, 0, 200_000, 8), 8),
        (Kernel("k", 16, 0, 0, 1), 64),
    ],
)
def test_resident_warps_follow_registers_and_shared_memory(kernel, warps):
    assert resident_warps(kernel, target_device("cuda:90")) == warps


@pytest.mark.interpret
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_the_interpreter_verifies_the_real_defaults(template):
    device = target_device("cuda:90")
    problem = Problem.of("fp32", 32, 2, "kv", 32, 16, 1024, 1)
    spec = Spec(template, problem, device, {n: t.default(problem, device) for n, t in TEMPLATES.items()})
    with Bench(FACTORY, "interpret", 300.0) as bench:
        assert bench.verify_cases(spec, spec.companions[template]) is None  # not set up yet
        assert bench.verify(spec, spec.companions[template]) is None


@pytest.mark.compile90
def test_a_real_static_run_ends_with_a_static_winner_for_every_template(store, monkeypatch):
    monkeypatch.setitem(EFFORTS, "least", types.Effort(1, 120.0, 0.01, 1, 0.01, 1, 1, timeout=120.0))
    problem = Problem.of("fp16", 32, 1, "v", 32, 16, 256, 1)
    rows = tune([problem], None, store, target="cuda:90", effort="least")
    assert [r.template for r in rows] == list(TEMPLATES) and all(r.config is not None for r in rows)
    assert len(store.winners()) == len(TEMPLATES) and all(w.static for w in store.winners())
