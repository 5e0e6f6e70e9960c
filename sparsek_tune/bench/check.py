"""Are the results right that are about to be timed? Nothing is timed that has not passed.

At a reduced length everything is compared with the float64 reference, at the timed length a sample (``tune.sample``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sparsek_tune import dispatch
from sparsek_tune.bench import ours
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Problem
from sparsek_tune.tune import sample
from sparsek_tune.tune.stages import Inputs, make_inputs
from sparsek_tune.tune.verify import TOLERANCE, compare, expected, reduced, relative_error


class Verdict(NamedTuple):
    """errors: relative errors by name; reason: why the check failed, None if it passed; tolerance: the most allowed."""

    errors: dict[str, float]
    reason: str | None
    tolerance: float

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.reason is None, "reason": self.reason, "tolerance": self.tolerance, **self.errors}


def at_reduced_length(problem: Problem, configs: Mapping[str, Config], device: str, seed: int) -> Verdict:
    """The public operator with ``configs`` at a small problem of the same kind, against the reference in float64."""
    small = reduced(problem)
    i = make_inputs(small, device, "normal", seed)
    want = expected(i)
    with dispatch.override(configs):
        got: dict[str, Tensor] = dict(zip(("out", "lse", "tau", "expiry"), ours.results(i), strict=True))
        names = [f"d{x}" for x, t in zip("qkvu", ours.leaves(i), strict=True) if t.requires_grad]
        got.update(zip(names, ours.forward_backward(i)(), strict=True))
    tolerance = TOLERANCE[small.dtype]
    errors = {name: relative_error(got[name].double(), want[name].double()) for name in ("out", "lse", *names)}
    return Verdict(errors, compare(got, want, tolerance, i.scores), tolerance)


def at_length(i: Inputs, dtype: str, seed: int, backward: bool = True) -> Verdict:
    """The public operator on the very inputs that are timed, against samples in float64."""
    found, grads = ours.results(i), ours.forward_backward(i)() if backward else None
    results = {"out": found.out, "lse": found.lse}
    if grads:
        results |= zip(("dq", "dk", "dv"), grads, strict=False)
    measured = sample.errors(i, found, results, seed)
    allowed = {name: max(TOLERANCE[dtype], inherent) for name, (_, inherent) in measured.items()}
    errors = {name: error for name, (error, _) in measured.items()}
    bad = [sample.too_far(name, e, allowed[name]) for name, e in errors.items() if not e <= allowed[name]]
    return Verdict(errors, "; ".join(bad) or None, max(allowed.values()))
