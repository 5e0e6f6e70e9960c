"""A space in Optuna's terms: exponents, positions, conditions; and one step in it."""

from __future__ import annotations

from landscape import large

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune.space import neighbours, parameters, suggest


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


def test_neighbours_are_one_step_away_and_keep_conditions():
    t = large()
    space = set(t.configs())
    near = list(neighbours(t, Config(a=64, b="w", c=1, staged=True, depth=8)))
    assert len(near) == len(set(near)) == 2 + 3 + 1 + 1 + 1 and set(near) <= space
    assert Config(a=64, b="w", c=1, staged=False, depth=1) in near
    assert Config(a=256, b="w", c=1, staged=True, depth=8) not in near


def test_parameters_are_the_way_back():
    class Given:
        def __init__(self, found):
            self.found = found

        def suggest_int(self, name, low, high):
            return self.found.pop(name)

        def suggest_categorical(self, name, choices):
            return self.found.pop(name)

    t = large()
    for config in t.configs():
        trial = Given(parameters(t, config))
        assert suggest(t, trial) == config and not trial.found
