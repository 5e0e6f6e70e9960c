"""Are results right? Small problems, their answers by the float64 reference, comparison within tolerances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsek_tune import reference
from sparsek_tune.problem import Problem

TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}  # ||got - want|| / ||want||
_SHARPER = {"lse": 0.1, "du": 0.4}  # fractions of TOLERANCE for sums in float32 of what is hardly rounded before
# A single row (of D entries, or one entry where there is no D) may be off by so many times that, of its own size or
# the usual one. Rounding takes up to 1.5; one wrong row in a million shows in no norm of the whole.
_ROW = 10
_INHERENT = 2  # a gradient may be so many times as far off as one whose output is stored in the inputs' dtype
_NOISE = 5e-7  # what float32 leaves, an entry, of terms of size 1 that cancel
# The kinds of scores of the small cases. The interpreter takes seconds a case: there, the two that reach most code.
SCORES = {"measure": ("normal", "ties", "equal", "rising"), "interpret": ("normal", "ties")}
_GRADS = ("dq", "dk", "dv", "du")
_COPIED = 1 << 24  # elements that are copied to float64 at a time
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


def expected(inputs: Any) -> dict[str, Tensor]:
    """Every output of the operators for ``stages.Inputs``, in float64 by the reference. NAME_inherent: by how much the
    gradient NAME is off, and nothing could be done about it."""
    i = inputs
    q, k, v, u, do = (t.double() for t in (i.query, i.key, i.value, i.scores, i.dout))
    args = (i.k, i.window, i.scale, i.gate)
    out, lse, *rest = reference.attention_forward(q, k, v, u, *args)
    selection = reference.Selection(*rest)
    grads = dict(zip(_GRADS, reference.attention_backward(do, q, k, v, u, out, lse, selection, *args), strict=True))
    # No implementation that stores its output in the inputs' dtype comes nearer than one that is exact otherwise.
    stored = out.to(i.query.dtype).double()
    nearest = reference.attention_backward(do, q, k, v, u, stored, lse, selection, *args)
    inherent = {f"{name}_inherent": x - grads[name] for name, x in zip(_GRADS, nearest, strict=True)}
    return {"out": out, "lse": lse, **selection._asdict(), **grads, **inherent}


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
    if name == "tau":
        infinite = torch.isinf(b)
        if not torch.equal(infinite, torch.isinf(a)):
            return "-inf at other queries"
        a, b, tolerance = a.masked_fill(infinite, 0), b.masked_fill(infinite, 0), TOLERANCE["fp32"]
    return _too_far(a, b, want.get(f"{name}_inherent"), allowed(name, tolerance))


def allowed(name: str, tolerance: float) -> float:
    """The relative error that the result ``name`` may have where those of the inputs' dtype may have ``tolerance``."""
    return max(TOLERANCE["fp32"], tolerance * _SHARPER.get(name, 1.0))


def _too_far(a: Tensor, b: Tensor, inherent: Tensor | None, tolerance: float) -> str | None:
    """Why ``a`` is further from ``b`` than rounding moves it, as a whole or in one row. Both [B, H, N] or [B, H, N, D];
    a NaN is far from everything."""

    def rows(*tensors: Tensor) -> Tensor:
        """The norms of the rows of the difference, or of the tensor, in float64."""
        count = max(1, _COPIED // tensors[0][0, 0].numel())  # heads at a time: a copy of all would be large
        heads = zip(*(t.flatten(0, 1).split(count) for t in tensors), strict=True)
        found = [h[0].double() - h[1].double() if len(h) == 2 else h[0].double() for h in heads]
        return torch.cat([torch.linalg.vector_norm(x, dim=-1) if x.dim() == 3 else x.abs() for x in found])

    norm = torch.linalg.vector_norm
    off, size = rows(a, b), rows(b)
    spare = torch.zeros_like(size) if inherent is None else _INHERENT * rows(inherent)
    noise = _NOISE * (b.shape[-1] if b.dim() == 4 else 1) ** 0.5
    error, most = norm(off), torch.maximum(tolerance * norm(size), norm(spare)) + noise * off.numel() ** 0.5
    if not error <= most:
        return f"relative error {float(error / norm(size)):.2e}, at most {float(most / norm(size)):.0e} allowed"
    size, spare = (x.clamp_min(x.square().mean().sqrt()) for x in (size, spare))
    bad = ~(off <= _ROW * (torch.maximum(tolerance * size, spare) + noise))
    if count := int(bad.sum()):
        what, worst = "rows" if b.dim() == 4 else "entries", float((off / size)[bad].max())
        return f"{count} of {bad.numel()} {what} are off, by up to {worst:.2e}"
    return None


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
