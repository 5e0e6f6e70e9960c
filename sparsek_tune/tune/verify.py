"""Is a candidate right? Poisoned buffers, small cases against the float64 reference, comparison within tolerances."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsek_tune import reference
from sparsek_tune.problem import Problem

TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}  # ||got - want|| / ||want||
# The kinds of scores of the small cases. The interpreter takes seconds a case: there, the two that reach most code.
SCORES = {"measure": ("normal", "ties", "equal", "rising"), "interpret": ("normal", "ties")}
_EXACT = ("expiry",)
_CROSSINGS = {"sat_end": 1.0, "sup_end": 0.0}  # first query where u - tau falls below (sat_end), or to, this value
_SLACK = 1e-4  # of u and tau: how near to the value a crossing may be and still fall either way


def reduced(problem: Problem, *, interpreter: bool = False) -> Problem:
    """A small problem that takes the same paths as ``problem``: same dtype (fp16 for bf16 in the interpreter, which has
    no bf16), head size, group and gate; budget and window cut down, the length no multiple of anything."""
    most_k, most_w, more = (24, 20, 53) if interpreter else (384, 192, 421)
    k, w = min(problem.k, most_k), min(problem.w, most_w)
    if problem.w >= problem.n:  # no candidates at all
        n, w = more, max(w, more + 2)
    elif problem.n - problem.w <= problem.k:  # the budget covers every candidate
        n, k = w + more, more + 2
    else:
        n = k + w + more
    n += 1 - n % 2
    dtype = "fp16" if interpreter and problem.dtype == "bf16" else problem.dtype
    return problem._replace(dtype=dtype, k=k, w=w, n=n, rows=min(problem.rows, 2))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the block new uninitialised tensors hold NaN, or an index far out of range: what a kernel forgets to
    write, or reads before it is written, shows."""
    owners = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in owners]

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: _fill(make(*args, **kwargs))

    try:
        for (owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, poison(original))
        yield
    finally:
        for (owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, original)


def _fill(t: Tensor) -> Tensor:
    if t.dtype.is_floating_point or t.dtype.is_complex:
        return t.fill_(float("nan"))
    return t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).min // 2)


def expected(inputs: Any) -> dict[str, Tensor]:
    """Every output of the operators for ``stages.Inputs``, in float64 by the reference."""
    i = inputs
    q, k, v, u, do = (t.double() for t in (i.query, i.key, i.value, i.scores, i.dout))
    args = (i.k, i.window, i.scale, i.gate)
    out, lse, *rest = reference.attention_forward(q, k, v, u, *args)
    selection = reference.Selection(*rest)
    dq, dk, dv, du = reference.attention_backward(do, q, k, v, u, out, lse, selection, *args)
    return {"out": out, "lse": lse, **selection._asdict(), "dq": dq, "dk": dk, "dv": dv, "du": du}


def compare(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float, scores: Tensor) -> str | None:
    """Why ``got`` is wrong, or None. Only names in both count; a selection is judged by its meaning: a position where
    ``u - tau`` crosses a value may move by a query where rounding decides. scores: [B, Hkv, N], of the same call."""
    for name in got.keys() & want.keys():
        if got[name].shape != want[name].shape:
            return f"{name}: shape {tuple(got[name].shape)}, expected {tuple(want[name].shape)}"
    for name in sorted(got.keys() & want.keys()):
        reason = _difference(name, got, want, tolerance, scores)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _difference(
    name: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float, scores: Tensor
) -> str | None:
    a, b = got[name], want[name]
    if name in _EXACT:
        bad = int((a.long() != b.long()).sum())
        return f"{bad} of {a.numel()} entries differ" if bad else None
    if name in _CROSSINGS:
        return _crossings_differ(a.long(), b.long(), scores, want["tau"], _CROSSINGS[name])
    if name == "interior":
        counted = interior(got["sat_end"], got["sup_end"])
        bad = int((a.long() != counted).sum())
        return f"{bad} of {a.numel()} counts do not agree with sat_end and sup_end" if bad else None
    a, b = a.double(), b.double()
    if name == "tau":
        infinite = torch.isinf(b)
        if not torch.equal(infinite, torch.isinf(a)):
            return "-inf at other queries"
        a, b, tolerance = a.masked_fill(infinite, 0), b.masked_fill(infinite, 0), TOLERANCE["fp32"]
    error = relative_error(a, b)
    return None if error <= tolerance else f"relative error {error:.2e}, at most {tolerance:.0e} allowed"


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, with ||b|| not below the norm of entries of 1e-3 (a gradient that cancels to zero); NaN where
    a holds one."""
    norm = torch.linalg.vector_norm
    return float(norm(a - b) / norm(b).clamp_min(1e-3 * b.numel() ** 0.5))


def _crossings_differ(a: Tensor, b: Tensor, scores: Tensor, tau: Tensor, value: float) -> str | None:
    """tau never falls, so where it is within rounding of the crossing at both ends of [a, b) it is so all the way."""
    n = a.shape[-1]
    if int(((a < 0) | (a > n)).sum()):
        return "entries out of range"
    u = scores.double()
    first, last = torch.minimum(a, b).clamp_max(n - 1), (torch.maximum(a, b) - 1).clamp_min(0)
    bad = torch.zeros_like(a, dtype=torch.bool)
    for end in (first, last):
        t = tau.double().gather(-1, end)
        slack = _SLACK * (1 + u.abs() + t.abs().nan_to_num(posinf=0.0))  # tau = -inf is no matter of rounding
        bad |= ~((u - t - value).abs() <= slack)
    wrong = int((bad & (a != b)).sum())
    return f"{wrong} of {a.numel()} entries differ beyond rounding" if wrong else None


def interior(sat_end: Tensor, sup_end: Tensor) -> Tensor:
    """|I_i| of every query (int64): the number of j with ``sat_end_j <= i < sup_end_j``. Both [..., N]."""
    n = sat_end.shape[-1]
    change = torch.zeros((*sat_end.shape[:-1], n + 1), dtype=torch.int64, device=sat_end.device)
    ones = torch.ones_like(sat_end, dtype=torch.int64)
    change.scatter_add_(-1, sat_end.long().clamp(0, n), ones)
    change.scatter_add_(-1, sup_end.long().clamp(0, n), -ones)
    return change.cumsum(-1)[..., :n]
