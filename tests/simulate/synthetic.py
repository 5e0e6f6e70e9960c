"""Landscapes of the 600 points of ``landscape.large``."""

from __future__ import annotations

from landscape import large, ms

from sparsek_tune.problem import Problem, target_device
from sparsek_tune.simulate.landscape import Landscape, Outcome

P = Problem("", 0, 0, "", 0, 0, 4096, 0)
D = target_device("cuda:90")


def hills(bad=lambda config: False, noise=0.0, template=None, problem=P, true=ms):
    """Every config takes ``landscape.ms``; those that are ``bad`` are infeasible."""
    t = template or large()
    outcomes = {
        c: Outcome("infeasible", None, 0.0, None) if bad(c) else Outcome("ok", ms(c), noise, true(c))
        for c in t.feasible(problem, D)
    }
    return Landscape(t, problem, D, outcomes, len(outcomes), 0.5)
