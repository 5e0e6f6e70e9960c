"""Proposals: small spaces once each, large ones by a sampler that learns, nothing twice, everything repeatable."""

from __future__ import annotations

import faults
import pytest

from sparsek_tune.kernel_templates.base import Choice, Config, Cost, Param, Pow2, Template
from sparsek_tune.tune.propose import Proposals, neighbours, suggest

P, D = faults.PROBLEM, faults.DEVICE


def large(check=lambda config, problem, device: None):
    """5 x 4 x 6 x (4 where staged, else 1) points; the fastest is a 64, b "z", c 2."""
    return Template(
        name="large",
        fields=frozenset({"n"}),
        space=(
            Param("a", Pow2(16, 256)),
            Param("b", Choice(("w", "x", "y", "z"))),
            Param("c", Pow2(1, 32)),
            Param("staged", Choice((False, True))),
            Param("depth", Pow2(1, 8), when=lambda c: bool(c["staged"])),
        ),
        default=lambda problem, device: Config(a=32, b="w", c=4, staged=False, depth=1),
        check=check,
        cost=lambda config, problem: Cost(1.0, 1.0),
        sources=(__file__,),
    )


def ms(config):
    a = abs(config["a"].bit_length() - 7)
    return 1.0 + a + abs(config["c"].bit_length() - 2) + (config["b"] != "z") + 0.5 * config["staged"]


def drain(proposals, answer=ms):
    asked = []
    while (config := proposals.ask()) is not None:
        asked.append(config)
        proposals.tell(config, answer(config))
    return asked


def test_a_small_space_is_covered_exactly_once_the_default_first():
    t = faults.template(tiles=(16, 256), faults=("a", "b", "c"))
    default = t.default(P, D)
    proposals = Proposals(t, P, D, 100, first=[default])
    assert proposals.total == 15
    asked = drain(proposals, lambda c: 1.0)
    assert asked[0] == default and len(asked) == 15 and set(asked) == set(t.configs())


def test_what_fails_the_check_is_never_proposed():
    t = large(lambda c, p, d: "too much" if c["a"] * c["c"] > 256 else None)
    asked = drain(Proposals(t, P, D, 80, first=[Config(a=256, b="z", c=32, staged=False, depth=1)]))
    assert len(asked) == 80 and all(c["a"] * c["c"] <= 256 for c in asked)


def test_a_large_space_gives_distinct_points_of_the_space_up_to_the_budget():
    t = large()
    asked = drain(Proposals(t, P, D, 60))
    assert len(asked) == len(set(asked)) == 60 and set(asked) <= set(t.configs())


@pytest.mark.parametrize("seed", range(3))
def test_the_sampler_learns(seed):
    """600 points, 60 trials: chance finds one of the best two (of cost <= 1.5) in 19 % of runs."""
    asked = drain(Proposals(large(), P, D, 60, seed=seed))
    assert min(map(ms, asked)) <= 1.5
    assert sum(map(ms, asked[20:])) / 40 < sum(map(ms, asked[:20])) / 20


def test_failures_teach_the_sampler_to_stay_away():
    asked = drain(Proposals(large(), P, D, 60, seed=1), lambda c: None if c["a"] > 32 else ms(c))
    late = asked[30:]
    assert sum(c["a"] > 32 for c in late) < 0.4 * len(late)  # of the space, it is 60 %


def test_equal_seeds_and_answers_give_equal_proposals():
    one, two, other = (drain(Proposals(large(), P, D, 50, seed=s)) for s in (5, 5, 6))
    assert one == two != other


def test_known_configs_are_never_proposed_but_count():
    t = large()
    known = {c: ms(c) for c in drain(Proposals(t, P, D, 40))}
    known[Config(a=16, b="x", c=1, staged=False, depth=1)] = None
    proposals = Proposals(t, P, D, 60, known=known, first=list(known))
    asked = drain(proposals)
    assert len(asked) == 60 - len(known) and not set(asked) & set(known) and proposals.total == 60
    assert drain(Proposals(t, P, D, 30, known=known)) == []


def test_a_space_that_the_trials_nearly_cover_ends_without_repeats():
    t = faults.template(tiles=(16, 256), faults=("a", "b", "c"))
    assert len(drain(Proposals(t, P, D, 14), lambda c: 1.0)) == 14


def test_many_open_proposals_are_distinct():
    proposals = Proposals(large(), P, D, 100)
    asked = [proposals.ask() for _ in range(30)]
    assert len(set(asked)) == 30 and None not in asked
    for config in reversed(asked):
        proposals.tell(config, ms(config))
    assert not set(drain(proposals)) & set(asked)


def test_configs_of_an_older_space_are_left_out():
    old = Config(a=16, gone=1)
    asked = drain(Proposals(large(), P, D, 10, first=[old], known={Config(b=1): 1.0}))
    assert old not in asked and len(asked) == 9


class FixedTrial:
    """Suggests the upper end of everything, and notes what was asked."""

    def __init__(self):
        self.asked = {}

    def suggest_int(self, name, low, high):
        self.asked[name] = (low, high)
        return high

    def suggest_categorical(self, name, choices):
        self.asked[name] = choices
        return choices[-1]


def test_powers_of_two_are_searched_by_exponent_and_conditions_hold():
    trial = FixedTrial()
    assert suggest(large(), trial) == Config(a=256, b="z", c=32, staged=True, depth=8)
    assert trial.asked["log2 a"] == (4, 8) and trial.asked["b"] == [0, 1, 2, 3] and "log2 depth" in trial.asked
    trial = FixedTrial()
    trial.suggest_categorical = lambda name, choices: 0
    assert suggest(large(), trial)["depth"] == 1 and "log2 depth" not in trial.asked


def test_a_template_with_one_config_is_done_after_it():
    t = faults.template(tiles=(32, 32))
    assert drain(Proposals(t, P, D, 10, first=[t.default(P, D)]), lambda c: 1.0) == [t.default(P, D)]


def test_neighbours_are_one_step_away_and_keep_conditions():
    t = large()
    space = set(t.configs())
    near = list(neighbours(t, Config(a=64, b="w", c=1, staged=True, depth=8)))
    assert len(near) == len(set(near)) == 2 + 3 + 1 + 1 + 1 and set(near) <= space
    assert Config(a=64, b="w", c=1, staged=False, depth=1) in near
    assert Config(a=256, b="w", c=1, staged=True, depth=8) not in near
