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
from sparsek_tune.tune.sample import (
    ROUNDED,
    at_positions,
    expected_keys,
    expected_queries,
    sample_keys,
    sample_queries,
)
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
    at = sample_queries(i.scores.shape[-1], seed)
    want = expected_queries(i, at)
    got = {"out": found.out[:, :, at], "lse": found.lse[:, :, at]}
    if grads:
        keys = sample_keys(found.expiry, seed)
        want.update(expected_keys(i, found, keys))
        got.update(dq=grads[0][:, :, at], dk=at_positions(grads[1], keys), dv=at_positions(grads[2], keys))
    errors = {name: relative_error(x.double(), want[name]) for name, x in got.items()}
    allowed = dict.fromkeys(got, TOLERANCE[dtype])
    if grads:
        # Where few keys have most of the weight, dq is a small difference of do * v and do * out, and out is stored in
        # the inputs' dtype: no implementation that does so comes closer.
        inherent = relative_error(want["dq_rounded"], want["dq"])
        allowed["dq"] = max(allowed["dq"], ROUNDED * inherent)
    bad = [f"{name}: relative error {e:.2e}, at most {allowed[name]:.0e} allowed" for name, e in errors.items()
           if not e <= allowed[name]]  # fmt: skip
    return Verdict(errors, "; ".join(bad) or None, max(allowed.values()))
