"""What replays come to, by hand."""

from __future__ import annotations

import math

import pytest
from landscape import ms
from synthetic import hills

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.simulate import plot
from sparsek_tune.simulate.landscape import Outcome
from sparsek_tune.simulate.pruning import pruning
from sparsek_tune.simulate.replay import Step
from sparsek_tune.simulate.results import after, at, chosen, quartiles, reached, result, summary
from sparsek_tune.tune.cubin import MOST_STACK

C = Config(a=1)


def steps(*points):
    """Of (quality, seconds)."""
    return [Step(C, 1.0, quality, seconds, seconds / 10) for quality, seconds in points]


def test_quartiles_are_values_that_occur():
    assert quartiles([5, 1, 4, 2, 3]) == [2, 3, 4]
    assert quartiles([1, 2, 3, math.inf]) == [1, 2, 3]
    assert quartiles([1, math.inf, math.inf]) == [1, None, None]
    assert quartiles([7]) == [7, 7, 7]


def test_a_run_is_read_by_measurements_and_by_seconds():
    run = steps((0.9, 0.0), (0.9, 2.0), (0.97, 3.0), (0.99, 8.0))
    assert reached(run) == 2 and reached(run, 0.98) == 3 and reached(run, 1.0) is None
    assert [after(run, n) for n in (0, 1, 2, 3, 99)] == [0.0, 0.9, 0.9, 0.97, 0.99]
    assert [at(run, s) for s in (-1.0, 0.0, 2.9, 3.0, 1e9)] == [0.0, 0.9, 0.9, 0.97, 0.99]
    assert reached([]) is None and after([], 3) == 0.0


def test_the_entry_of_a_strategy():
    landscape = hills()
    runs = [steps((0.9, 0.0), (0.98, 10.0)), steps((0.9, 0.0), (0.95, 20.0)), steps((0.9, 0.0), (1.0, 5.0))]
    for run in runs:
        run[0] = run[0]._replace(config=landscape.default)
        run[1] = run[1]._replace(config=landscape.winner)
    entry = result("x", landscape, runs, {"ahead": 3})
    assert entry["space"] == 600 and entry["seeds"] == 3 and entry["ahead"] == 3 and entry["kernel"] == "large"
    assert entry["measurements_to_level"] == [2, 2, None] and entry["seconds_to_level"] == [5.0, 10.0, None]
    assert entry["quality_at_count"]["20"] == [0.95, 0.98, 1.0] == entry["quality_at_share"]["0.1"]
    assert entry["by_measurements"] == [[1, 0.9, 0.9, 0.9], [2, 0.95, 0.98, 1.0]]
    assert entry["by_seconds"][0] == [1.0, 0.9, 0.9, 0.9] and entry["by_seconds"][-1] == [20.0, 0.95, 0.98, 1.0]
    assert entry["thinking_seconds"] == [0.5, 1.0, 2.0] and entry["chosen"] == [1.0, 1.0, 1.0]
    total = summary([entry, {**entry, "measurements_to_level": [None] * 3, "seconds_to_level": [None] * 3}])["x"]
    assert total["reached"] == 1 and total["landscapes"] == 2 and total["share_to_level"] == pytest.approx(2 / 600)
    assert total["quality_at_count"]["20"] == {"median": 0.98, "mean": 0.98, "worst": 0.98}


def test_the_race_chooses_among_those_that_were_measured_fastest():
    landscape = hills()
    ordered = sorted(landscape.outcomes, key=ms)
    slow = [Step(c, 10.0 + i, 0, 0, 0) for i, c in enumerate(ordered[300:310])]
    unlucky = Step(ordered[0], 99.0, 1.0, 0, 0)  # the fastest, measured as the slowest
    best = max(landscape.quality(c) for c in ordered[300:305])
    assert chosen([*slow, unlucky], landscape) == best < 1.0
    assert chosen([*slow[:4], unlucky], landscape) == 1.0
    default = Step(landscape.default, 99.0, 0, 0, 0)
    assert chosen([*slow, default], landscape) == max(best, landscape.quality(landscape.default)) > best
    assert chosen([], landscape) == 0.0


def test_pruning_is_judged_where_the_sweep_timed_what_was_pruned():
    landscape = hills(bad=lambda config: config["b"] == "x")
    told = pruning(landscape)
    assert told["points"] == told["space"] == told["known"] == 600 and told["dropped"] == told["failed"] == 0
    assert told["infeasible"] == 150 and told["dropped_best"] is told["spilled_best"] is told["near_best"] is None
    assert told["timed"] == told["wrong"] == 0
    assert told["cheaper"] == list(landscape.outcomes).index(landscape.winner)  # all cost the same
    [best, second, *_] = sorted((c for c, o in landscape.outcomes.items() if o.ms), key=ms)
    outcomes = dict(landscape.outcomes)
    outcomes[best] = outcomes[best]._replace(stack=MOST_STACK)
    outcomes[second] = outcomes[second]._replace(stack=MOST_STACK + 8)
    landscape.outcomes = outcomes
    landscape.dropped = {Config(a=0): outcomes[best]._replace(true_ms=0.5), Config(a=1): outcomes[best]}
    told = pruning(landscape)
    assert told["near_best"] == 1.0 and told["spilled_best"] == ms(best) / ms(second)
    assert told["dropped_best"] == 2.0 and (told["timed"], told["wrong"]) == (3, 1)  # would have won


def test_lines_are_means_that_keep_their_last_values():
    points = plot.band([[[1, 0.5, 0.6, 0.7], [10, 0.9, 1.0, 1.0]], [[1, 0.7, 0.8, 0.9], [100, 1.0, 1.0, 1.0]]])
    by_x = {round(x, 6): rest for x, *rest in points}
    assert points[0] == (1, pytest.approx(0.6), pytest.approx(0.7), pytest.approx(0.8))
    assert by_x[100.0] == [pytest.approx(0.95), 1.0, 1.0]
    middle = next(rest for x, *rest in points if 10 < x < 11)
    assert middle == [pytest.approx(0.8), pytest.approx(0.9), pytest.approx(0.95)]


def test_pruning_that_costs_the_winner_is_counted():
    landscape = hills()
    best = min(landscape.outcomes, key=ms)
    outcomes = dict(landscape.outcomes)
    outcomes[best] = outcomes[best]._replace(stack=MOST_STACK + 8)
    landscape.outcomes = outcomes
    told = pruning(landscape)
    assert told["spilled_best"] == 1.0 and (told["timed"], told["wrong"]) == (1, 1)


def test_what_fails_or_is_unknown_is_not_what_is_dropped():
    landscape = hills()
    [_, second, *_, last] = sorted(landscape.outcomes, key=ms)
    outcomes = dict(landscape.outcomes)
    outcomes[second] = Outcome("wrong", None, 0.0, None)
    del outcomes[last]  # the sweep does not tell of it
    landscape.outcomes, landscape.space = outcomes, 600 - 10
    told = pruning(landscape)
    assert (told["known"], told["dropped"], told["failed"], told["infeasible"]) == (599, 10, 1, 0)
