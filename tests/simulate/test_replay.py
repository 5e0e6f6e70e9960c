"""Replays: order and seconds by the model of the clock, the production search driven as it is."""

from __future__ import annotations

from itertools import pairwise

import pytest
from landscape import ms
from synthetic import hills

from sparsek_tune.simulate import external, replay, strategies
from sparsek_tune.simulate.replay import Machine
from sparsek_tune.simulate.run import Settings, one
from sparsek_tune.simulate.strategies import Listed
from sparsek_tune.tune.propose import Proposals


@pytest.fixture(params=[n for n in strategies.STRATEGIES if n != "gp" and n not in external.ALGORITHMS])
def name(request):
    if missing := strategies.missing_packages(request.param):
        pytest.skip(f"needs {missing}")
    return request.param


class Thoughts:
    """Configs in order; each takes ``seconds`` of thinking, by a clock of its own."""

    def __init__(self, configs, seconds):
        self.configs, self.seconds, self.now = list(configs), seconds, 0.0
        self.asked, self.told = [], []

    def ask(self):
        if not self.configs:
            return None
        self.now += self.seconds
        self.asked.append(self.configs.pop(0))
        return self.asked[-1]

    def tell(self, config, time):
        self.told.append(config)


def five(landscape):
    a = landscape.default
    return [a, *[c for c in landscape.outcomes if c != a][:4]]


def run(monkeypatch, seconds, **options):
    """Five configs, the default first, compiled in 3, 1, 2 and 1 seconds and judged in half a second."""
    landscape = hills()
    _, b, c, d, e = configs = five(landscape)
    took = {b: 3.0, c: 1.0, d: 2.0, e: 1.0}
    monkeypatch.setattr(replay, "compile_seconds", lambda landscape, config, seed: took[config])
    thoughts = Thoughts(configs, seconds)
    steps = replay.replay(thoughts, landscape, 5, thinking=lambda: thoughts.now, **options)
    names = dict(zip(configs, "abcde", strict=True))
    return [(names[s.config], s.seconds) for s in steps], steps


def test_the_clock_by_hand(monkeypatch):
    # Three in flight, two processes: b compiles from 0 to 3, c from 0 to 1, then d to 3; c is judged at 1.5, and e
    # takes its place: it compiles from 3 to 4. The judge has b at 3, d at 3.5, e at 4.
    order, steps = run(monkeypatch, 0.0, ahead=3, jobs=2)
    assert order == [("a", 0.0), ("c", 1.5), ("b", 3.5), ("d", 4.0), ("e", 4.5)]
    assert {s.thinking for s in steps} == {0.0}


def test_thinking_takes_time_and_changes_no_order(monkeypatch):
    # a is asked for until 10, b until 20, c until 30, d until 40; c was compiled at 31 and is judged from 40 to 40.5; e
    # is asked for until 50.5, compiled at 51.5, while b is judged from 50.5 to 51, d to 51.5, e to 52.
    order, steps = run(monkeypatch, 10.0, ahead=3, jobs=2)
    assert order == [("a", 10.0), ("c", 40.5), ("b", 51.0), ("d", 51.5), ("e", 52.0)]
    assert [s.thinking for s in steps] == [10.0, 40.0, 50.0, 50.0, 50.0]


def test_one_in_flight_is_one_after_the_other(monkeypatch):
    order, _ = run(monkeypatch, 0.0, ahead=1, jobs=16)
    assert order == [("a", 0.0), ("b", 3.5), ("c", 5.0), ("d", 7.5), ("e", 9.0)]


def test_what_does_not_compile_is_not_judged(monkeypatch):
    landscape = hills(bad=lambda config: config["b"] == "x")
    bad = [c for c, o in landscape.outcomes.items() if o.status == "infeasible"][:2]
    monkeypatch.setattr(replay, "compile_seconds", lambda *_: 2.0)
    steps = replay.replay(Listed([landscape.default, *bad]), landscape, 9, jobs=1, thinking=lambda: 0.0)
    assert [(s.ms, s.seconds) for s in steps] == [(ms(landscape.default), 0.0), (None, 2.0), (None, 4.0)]


def test_no_more_in_flight_than_wanted():
    landscape = hills()
    for ahead in (1, 3, 40):
        thoughts = Thoughts(landscape.outcomes, 0.0)
        most = 0

        def ask(thoughts=thoughts, asking=thoughts.ask):
            nonlocal most
            found = asking()
            most = max(most, len(thoughts.asked) - len(thoughts.told))
            return found

        thoughts.ask = ask
        steps = replay.replay(thoughts, landscape, 100, ahead=ahead)
        assert most == ahead and len(steps) == 100 == len(thoughts.asked)


def test_a_machine_by_hand():
    machine = Machine(2)
    assert [machine.compile(at, 2.0) for at in (0.0, 1.0, 1.0, 9.0)] == [2.0, 3.0, 4.0, 11.0]
    assert [machine.judge(at, 1.0) for at in (0.0, 0.5, 7.0)] == [1.0, 2.0, 8.0]


def test_one_ahead_is_the_production_search_driven_by_hand():
    landscape = hills(bad=lambda config: config["b"] == "x", noise=0.05)
    steps = one("tpe", landscape, [landscape], Settings(trials=40, ahead=1), seed=3)
    search = Proposals(
        landscape.kernel, landscape.problem, landscape.device, 40, first=[landscape.default], seed=3, sampler="tpe"
    )
    expected = []
    while (config := search.ask()) is not None:
        expected.append((config, landscape.measure(config, 3)))
        search.tell(*expected[-1])
    assert [(s.config, s.ms) for s in steps] == expected and len(expected) == 40


def test_curves_rise_repeat_themselves_and_differ_by_seed(name):
    landscape = hills(bad=lambda config: config["b"] == "x", noise=0.02)
    runs = [one(name, landscape, [landscape], Settings(trials=30, ahead=8), seed) for seed in (0, 0, 1)]
    for steps in runs:
        assert all(a.quality <= b.quality and a.seconds <= b.seconds for a, b in pairwise(steps))
        assert all(s.quality >= landscape.quality(s.config) for s in steps)
        configs = [s.config for s in steps]
        assert len(set(configs)) == len(configs) == (600 if name == "exhaustive" else 30)
        assert configs[0] == landscape.default and steps[0].seconds <= steps[0].thinking
        assert steps[-1].quality == max(map(landscape.quality, configs))
    first, again, other = [[(s.config, s.ms, s.quality) for s in steps] for steps in runs]
    assert first == again != other


def test_what_is_looked_at_first():
    landscape = hills()
    near = hills(template=landscape.kernel, problem=landscape.problem._replace(n=8192))
    found = {
        start: [s.config for s in one("random", landscape, [landscape, near], Settings(trials=9, start=start), 5)]
        for start in ("cold", "warm", "blind")
    }
    assert found["cold"][0] == found["warm"][0] == landscape.default and near.winner in found["warm"]
    assert near.winner not in found["cold"] and found["blind"][0] != landscape.default


def test_the_cost_model_alone_asks_for_the_cheapest():
    landscape = hills()
    assert strategies.by_cost(landscape) == list(landscape.outcomes)  # all cost the same: as the space has them


@pytest.mark.parametrize("algorithm", external.ALGORITHMS)
def test_helions_searches(algorithm):
    pytest.importorskip("helion")
    landscape = hills(bad=lambda config: config["b"] == "x", noise=0.02)
    runs = [one(algorithm, landscape, [landscape], Settings(trials=40, ahead=8), seed) for seed in (0, 0, 1)]
    first, again, other = [[(s.config, s.ms) for s in steps] for steps in runs]
    assert first == again != other
    for steps in runs:
        configs = [s.config for s in steps]
        assert configs[0] == landscape.default and len(set(configs)) == len(configs) > 20
        assert set(configs) <= set(landscape.outcomes)
        assert steps[-1].quality > landscape.quality(landscape.default)


def test_a_search_of_helions_that_is_left_ends():
    pytest.importorskip("helion")
    search = external.Helion("helion-pattern", landscape := hills(), [landscape.default], 0)
    assert search.ask() == landscape.default
    search.close()
    assert not search._thread.is_alive() and search.ask() is None
