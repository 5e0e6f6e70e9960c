"""What a sweep says of its configs: times, noise, the optimum, and what it does not say."""

from __future__ import annotations

import copy
import statistics

import pytest
from landscape import large, ms
from synthetic import D, P, hills

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.report import evidence
from sparsek_tune.simulate.landscape import landscapes, starts


def read(records):
    return landscapes(evidence.gpus(records))


def test_a_sweep_is_complete_and_a_search_is_not(sweep):
    found, left_out = read(sweep)
    assert not left_out
    schedules, forwards = found[:2], found[2:]
    assert [landscape.kernel.name for landscape in found] == ["schedule"] * 2 + ["forward"] * 2
    assert all(s.complete and len(s.outcomes) == s.space == 140 for s in schedules)
    assert all(not f.complete and len(f.outcomes) == 20 and f.space == 474 for f in forwards)
    for landscape in found:  # what the sweep does not tell of cannot be proposed
        assert set(landscape.template.feasible(landscape.problem, landscape.device)) == set(landscape.outcomes)
        assert landscape.default in landscape.outcomes and landscape.quality(landscape.winner) == 1.0


def test_races_decide_and_what_was_not_raced_is_brought_to_their_scale(sweep):
    records = [r for r in copy.deepcopy(sweep) if r["template"]["name"] == "schedule" and r["problem"]["n"] == 4096]
    raced = {Config(r["config"]): r for r in records if r["protocol"].get("phase") == "race"}
    for record in raced.values():  # hotter: everybody takes longer there
        for name in ("median_ms", "ci_low_ms", "ci_high_ms"):
            record[name] *= 1.1
    [landscape], _ = read(records)
    times = {c: r["median_ms"] for c, r in raced.items()}
    assert landscape.winner == min(times, key=lambda c: times[c])
    for config, time in times.items():
        assert landscape.quality(config) == pytest.approx(min(times.values()) / time)
    scale = statistics.median(time / landscape.outcomes[c].ms for c, time in times.items())
    others = [(c, o) for c, o in landscape.outcomes.items() if o.ms and c not in times]
    slowest, outcome = max(others, key=lambda other: other[1].ms)
    assert landscape.quality(slowest) == pytest.approx(min(times.values()) / (outcome.ms * scale))
    assert all(landscape.quality(c) <= 1.0 for c in landscape.outcomes)


def test_noise_is_that_of_the_interval_and_the_same_for_a_seed(sweep):
    landscape = read(sweep)[0][0]
    config, outcome = next((c, o) for c, o in landscape.outcomes.items() if o.ms)
    assert outcome.noise == pytest.approx(0.01 / 1.96, rel=1e-3)
    drawn = [landscape.measure(config, seed) for seed in range(400)]
    assert drawn[7] == landscape.measure(config, 7) != drawn[8]
    assert statistics.mean(drawn) == pytest.approx(outcome.ms, rel=1e-3)
    assert statistics.stdev(drawn) == pytest.approx(outcome.noise * outcome.ms, rel=0.15)
    failed = next(c for c, o in landscape.outcomes.items() if not o.ms)
    assert landscape.measure(failed, 0) is None and landscape.quality(failed) == 0.0


def test_the_judge_takes_what_lies_between_two_results(sweep):
    assert read(sweep)[0][0].judge_seconds == 0.1  # a second, in these records: more than judging ever takes


def test_what_cannot_be_replayed_is_named(sweep):
    records = copy.deepcopy(sweep)
    for record in records:
        if record["template"]["name"] == "forward":
            record["template"]["source_hash"] = "0" * 16
    default = read(sweep)[0][0].default
    records = [r for r in records if not (r["problem"]["n"] == 4096 and Config(r["config"]) == default)]
    found, left_out = read(records)
    assert [(x.kernel.name, x.problem.n) for x in found] == [("schedule", 65536)]
    assert sorted(why.split(": ")[1] for why in left_out) == [
        "of another version of the kernel's source", "of another version of the kernel's source",
        "the default config has no time",
    ]  # fmt: skip


def test_starts_are_winners_elsewhere_nearest_first():
    t = large()
    best = {n: Config(a=64, b="z", c=c, staged=False, depth=1) for n, c in ((2048, 1), (8192, 4), (65536, 8))}
    here = hills(template=t)
    others = [
        hills(template=t, problem=P._replace(n=n), true=lambda c, b=b: 0.1 if c == b else ms(c))
        for n, b in best.items()
    ]
    assert starts(here, [*others[::-1], here]) == [best[8192], best[2048], best[65536]]
    assert starts(here, [hills(template=large())]) == []  # another kernel


def test_points_outside_of_the_space_are_kept_apart(sweep):
    records = copy.deepcopy(sweep[:200])
    [schedule] = [x for x in read(records)[0] if x.complete][:1]
    dropped = next(c for c in schedule.kernel.configs() if schedule.kernel.check(c, schedule.problem, D) is not None)
    records.append(copy.deepcopy(next(r for r in records if Config(r["config"]) == schedule.winner)))
    records[-1]["config"] = dict(dropped)
    again = read(records)[0][0]
    assert set(again.dropped) == {dropped} and len(again.outcomes) == again.space == 140 and again.complete
