"""Importances find the parameters that decide, tell what is chance, and stay silent where too little is known."""

from __future__ import annotations

import random

import pytest
import simulated

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.report import importance
from sparsek_tune.report.evidence import Attempt, Kernel, Search

SPACE = {"tile": (16, 32, 64, 128, 256), "warps": (4, 8), "stages": (1, 2, 3), "way": ("a", "b", "c")}


def search(time, configs=120, seed=0, scale=1.0, space=SPACE):
    """Random configs, whose times (ms) are ``time(config)``."""
    rng = random.Random(seed)
    found = Search(simulated.H100, Kernel("x", "0", "0"), simulated.SHORT)
    while len(found.attempts) < configs:
        config = Config({name: rng.choice(values) for name, values in space.items()}, id=len(found.attempts))
        ms = scale * time(config, rng)
        found.attempts.append(Attempt(config, "ok", "", ms, None, None, False, (), ""))
    return found


def unnamed(searches):
    """The importances without the number that makes configs distinct."""
    found = importance.importance(searches)
    return {s.name: s for s in found.shares if s.name != "id"}


@pytest.mark.parametrize("name", SPACE)
def test_the_parameter_that_decides_comes_first(name):
    found = unnamed([search(lambda c, rng: 1 + SPACE[name].index(c[name]) + 0.01 * rng.random())])
    best = max(found.values(), key=lambda s: s.share)
    assert best.name == name and best.clear and best.share > 0.5


def test_chance_is_told():
    """Where nothing decides, hardly a parameter stands above all random orders."""
    clear = [s.clear for seed in range(10) for s in unnamed([search(lambda c, rng: rng.random(), seed=seed)]).values()]
    assert len(clear) == 40 and sum(clear) <= 6  # 2 expected


def test_problems_of_other_scale_are_comparable():
    """Half of the configs at a problem that is a thousand times as large: their times alone would hide the tile."""
    short = search(lambda c, rng: 1 + SPACE["tile"].index(c["tile"]) + 0.01 * rng.random(), 60)
    long = search(lambda c, rng: 1 + SPACE["tile"].index(c["tile"]) + 0.01 * rng.random(), 60, seed=1, scale=1e3)
    found = importance.importance([short, long])
    assert (found.configs, found.problems) == (120, 2)
    assert unnamed([short, long])["tile"].share > 0.6


def test_shares_add_up_and_are_the_same_each_time():
    made = [search(lambda c, rng: c["tile"] + rng.random())]
    first = importance.importance(made)
    assert sum(s.share for s in first.shares) == pytest.approx(1) and importance.importance(made) == first
    assert [s.share for s in first.shares] == sorted((s.share for s in first.shares), reverse=True)


def test_too_few_are_too_few():
    def time(config, rng):
        return rng.random()

    few = importance.importance([search(time, importance.ENOUGH - 1)])
    assert few == (importance.ENOUGH - 1, 1, ())
    assert importance.importance([search(time, importance.ENOUGH)]).shares
    each = [search(time, importance.ENOUGH_EACH - 1, seed) for seed in range(20)]
    assert importance.importance(each) == (0, 0, ())
    assert importance.importance([]) == (0, 0, ())


def test_failed_configs_and_races_do_not_count():
    made = search(lambda c, rng: rng.random(), importance.ENOUGH)
    failed = made.attempts[0]._replace(status="wrong", ms=None)
    raced = made.attempts[1]._replace(config=Config(tile=1), race=True)
    made.attempts += [failed, raced]
    assert importance.importance([made]).configs == importance.ENOUGH - 1


def test_what_does_not_vary_or_is_not_everywhere_is_left_out():
    made = search(lambda c, rng: rng.random(), space={**SPACE, "fixed": (1,)})
    made.attempts.append(made.attempts[0]._replace(config=Config(tile=512, stages=1, way=True, id=-1)))
    assert set(unnamed([made])) == {"tile", "stages", "way"}


def test_many_configs_are_thinned_out_evenly():
    made = search(lambda c, rng: 1 + SPACE["tile"].index(c["tile"]) + rng.random() / 100, 3 * importance.MOST)
    found = importance.importance([made])
    assert found.configs == 3 * importance.MOST
    assert found.shares[0].name == "tile"
