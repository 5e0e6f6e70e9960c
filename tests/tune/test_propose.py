"""Proposals: small spaces once each, large ones by a sampler that learns, nothing twice, everything repeatable."""

from __future__ import annotations

import faults
import pytest
from landscape import large, ms

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune.propose import Proposals
from sparsek_tune.tune.samplers import works

P, D = faults.PROBLEM, faults.DEVICE


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


def test_a_config_without_a_time_is_told_as_the_slowest_and_as_a_violation():
    """Not as any number beyond all others, which would bend a model of the values."""
    proposals = Proposals(large(), P, D, 30, known={Config(a=16, b="x", c=1, staged=False, depth=1): None})
    drain(proposals, lambda c: None if c["a"] > 64 else ms(c))
    trials = [t for t in proposals._study.trials if t.value is not None]
    bad = [t.value for t in trials if not works(t)]
    assert bad and set(bad) <= {t.value for t in trials if works(t)} | {0.0}
    known = {Config(a=16, b=b, c=1, staged=False, depth=1): t for b, t in (("x", None), ("w", 3.0))}
    assert [t.value for t in Proposals(large(), P, D, 30, known=known)._study.trials] == [3.0, 3.0]


def test_the_sampler_is_chosen_by_name():
    asked = {name: drain(Proposals(large(), P, D, 30, sampler=name, seed=1)) for name in ("tpe", "random")}
    assert asked["tpe"] == drain(Proposals(large(), P, D, 30, seed=1)) != asked["random"]
    with pytest.raises(ValueError, match=r"sampler must be one of tpe, .*, but is 'grid'"):
        Proposals(large(), P, D, 30, sampler="grid")


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


def test_a_template_with_one_config_is_done_after_it():
    t = faults.template(tiles=(32, 32))
    assert drain(Proposals(t, P, D, 10, first=[t.default(P, D)]), lambda c: 1.0) == [t.default(P, D)]


def test_what_others_tried_counts_against_the_trials():
    t = large()
    proposals = Proposals(t, P, D, 20)
    for config in list(t.configs())[:15]:
        proposals.tell(config, ms(config))
    assert proposals.total == 20 and len(drain(proposals)) == 5


def test_what_nothing_came_of_is_proposed_again_next_and_counts_once():
    proposals = Proposals(large(), P, D, 20)
    first = [proposals.ask() for _ in range(3)]
    proposals.again(first[1])
    assert proposals.beginning and proposals.total == 20
    asked = drain(proposals)
    assert asked[0] == first[1] and len(asked) == 18 and not set(asked) & {first[0], first[2]}
