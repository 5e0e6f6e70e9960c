"""Records become searches: in order, races apart, nothing lost, nothing of a wrong type taken."""

from __future__ import annotations

import copy

import pytest
import simulated

from sparsek_tune.kernel_templates import FAMILIES, TEMPLATES
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.report import evidence, failures
from sparsek_tune.report.evidence import Step

A, B, C = (Config(x=i) for i in range(3))


def record(config, status="ok", ms=None, second=0, race=False, winner=None, **changed):
    """One attempt at a made-up kernel."""
    made = {
        "device": simulated.H100.as_dict(),
        "template": {"name": "made-up", "source_hash": "0", "space_version": "0"},
        "problem": simulated.SHORT._asdict(),
        "config": dict(config), "status": status, "reason": "",
        "median_ms": ms, "ci_low_ms": None, "ci_high_ms": None, "samples": 0,
        "protocol": {"phase": "race"} if race else {}, "created_at": f"2025-01-01T00:00:{second:02}.000000+00:00",
        "run": {"command": "", "host": "", "pid": 1, "outcome": "done", "started_at": "", "finished_at": None},
        "winner": winner,
    }  # fmt: skip
    return {**made, **changed}


def search(*records):
    (gpu,) = evidence.gpus(records)
    (found,) = gpu.searches
    return found


def test_everything_is_there_once(records):
    gpus = evidence.gpus(records)
    assert [g.device.name for g in gpus] == [simulated.H100.name, simulated.A100.name]
    assert sum(len(s.attempts) for g in gpus for s in g.searches) == len(records)
    for gpu in gpus:
        assert [s.kernel.name for s in gpu.searches] == [name for name in FAMILIES for _ in range(2)]
        assert all(s.winner is not None and s.kernel.current for s in gpu.searches)


def test_a_curve_counts_configs_and_leaves_races_out():
    found = search(
        record(A, ms=4.0, second=1), record(B, "wrong", second=2), record(A, ms=3.0, second=3),
        record(C, ms=3.5, second=4), record(B, ms=2.0, second=5), record(C, ms=1.0, second=6, race=True),
    )  # fmt: skip
    assert found.curve == [Step(1, 4.0), Step(2, 3.0), Step(3, 2.0)]
    assert found.times == {A: 3.0, B: 2.0, C: 3.5}
    assert list(found.race) == [C]


def test_records_count_in_the_order_of_their_times():
    late, early = record(A, ms=1.0, second=9), record(B, ms=2.0, second=1)
    assert search(late, early).curve == search(early, late).curve == [Step(1, 2.0), Step(2, 1.0)]


def test_the_race_is_that_of_the_latest_run_that_held_one():
    run = record(A)["run"]
    first, second, third = ({**run, "pid": pid} for pid in (1, 2, 3))
    found = search(
        record(A, ms=1.0, second=1, race=True, run=first), record(B, ms=1.0, second=2, race=True, run=first),
        record(A, ms=2.0, second=3, race=True, run=second), record(C, ms=2.0, second=4, race=True, run=second),
        record(B, ms=3.0, second=5, run=third),
    )  # fmt: skip
    assert {c: a.ms for c, a in found.race.items()} == {A: 2.0, C: 2.0}


def test_another_driver_or_source_is_another_search():
    device = simulated.H100.as_dict()
    gpus = evidence.gpus([
        record(A, ms=1.0), record(A, ms=1.0, device={**device, "driver": "571"}),
        record(A, ms=1.0, template={"name": "made-up", "source_hash": "1", "space_version": "0"}),
    ])  # fmt: skip
    assert [len(g.searches) for g in gpus] == [2, 1]
    assert not any(s.kernel.current for g in gpus for s in g.searches)


def test_a_speed_up_needs_both_times():
    assert search(record(A, ms=1.0, winner={"default_ms": 3.0, "tuned_ms": 2.0})).winner.speedup == 1.5
    static = search(record(A, "static", ms=1.0, winner={"default_ms": None, "tuned_ms": None}))
    assert static.winner.static and static.winner.speedup is None
    assert not static.curve and not static.times


def test_the_default_is_the_templates(records):
    for gpu in evidence.gpus(records):
        for s in gpu.searches:
            assert s.default == TEMPLATES[s.kernel.name].default(s.problem, s.device)
            assert s.default in s.trials


def test_an_impossible_problem_has_no_default(records):
    changed = copy.deepcopy([r for r in records if r["template"]["name"] == "dkv"][:1])
    changed[0]["problem"].update(k=0, n=0)
    assert search(*changed).default is None


@pytest.mark.parametrize(
    "part, field, value",
    [("device", "cc", "90"), ("device", "name", 1), ("problem", "n", "x"), ("problem", "dtype", None),
     ("template", "name", b"x"), (None, "median_ms", float("inf")), (None, "median_ms", -1.0), (None, "median_ms", "1"),
     ("winner", "tuned_ms", 0)],
)  # fmt: skip
def test_what_is_of_the_wrong_type_is_refused(part, field, value):
    bad = record(A, ms=1.0, winner={"default_ms": 1.0, "tuned_ms": 1.0})
    (bad if part is None else bad[part])[field] = value
    with pytest.raises(ValueError, match="must be"):
        evidence.gpus([bad])


def test_failures_are_grouped_by_cause():
    (gpu,) = evidence.gpus([
        record(A, "infeasible", second=1, reason="spills 16 bytes"), record(B, "compile", second=2, reason="no"),
        record(B, "infeasible", second=4, reason="spills 1.5e3 bytes"), record(C, ms=1.0, second=5),
        record(C, "infeasible", second=3, reason="spills 0x1f bytes"), record(C, "runtime", second=6, reason="no"),
    ])  # fmt: skip
    found = failures.causes(gpu)
    assert [(c.status, c.pattern, c.count) for c in found] == [
        ("infeasible", "spills … bytes", 3), ("compile", "no", 1), ("runtime", "no", 1)
    ]  # fmt: skip
    assert found[0].example.config == B and found[0].example.reason == "spills 1.5e3 bytes"
    assert found[0].kernels == {"made-up": 3}
