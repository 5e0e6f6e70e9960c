"""The operators by definition, in plain PyTorch: any device, vectorised, float64 where asked for.

This is the oracle that the kernels are judged by, and the path that CPU tensors take. Selection is solved in float64
whatever the scores' dtype; attention is computed in float64 for float64 queries and in float32 otherwise. Work is
quadratic in N, memory is not: everything runs in blocks of a bounded number of elements.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .problem import GATES

BLOCK = 1 << 22  # elements of one temporary; about ten of them live at a time
LIMIT = 2.0**30  # scores beyond it count as saturated or zero: float64 resolves 1 / N up to here, float32 nothing


class Selection(NamedTuple):
    """What the scores of one call select; every tensor is [B, Hkv, N].

    tau: threshold by query, float64 for float64 scores, else float32; -inf where there are at most k candidates.
    expiry: int32 by key: key j is selected by exactly the queries ``[j + window, expiry_j)``.
    sat_end: int32 by key: the first query ``i >= j + window`` with ``u_j - tau_i < 1``.
    sup_end: int32 by key: the first query ``i >= j + window`` with ``u_j - tau_i <= 0``.
    interior: int32 by query: number of candidates with ``0 < u_j - tau_i < 1``, selected or not; query i's are the
    keys with ``sat_end_j <= i < sup_end_j``.
    expiry, sat_end and sup_end are N where there is no such query, and where ``j + window >= N``.
    """

    tau: Tensor
    expiry: Tensor
    sat_end: Tensor
    sup_end: Tensor
    interior: Tensor


# ---- The bare projection --------------------------------------------------------------------------------------------


def sparsek(z: Tensor, k: float, dim: int = -1) -> Tensor:
    """Projection of ``z`` on ``{p : 0 <= p <= 1, sum(p) = k}`` along ``dim``: ``clip(z - tau, 0, 1)``.

    z: floating point, any shape and device. k: a number > 0; where it is not below the size of ``dim``, the result is
    all ones. Returns a tensor like ``z``; differentiable. Raises TypeError or ValueError for invalid arguments.
    """
    _check_float("z", z)
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise TypeError(f"k must be an int or a float, but is {k!r} of type {type(k).__name__}")
    if not 0 < k < math.inf:
        raise ValueError(f"k must be positive and finite, but is {k}")
    if not -z.dim() <= dim < z.dim():
        raise ValueError(f"dim must be in [{-z.dim()}, {z.dim()}) for z of {z.dim()} dimensions, but is {dim}")
    return _SparseK.apply(z.movedim(dim, -1), k)[0].movedim(-1, dim)


class _SparseK(torch.autograd.Function):
    """The projection along the last dimension. Its Jacobian is constant around z, so backward is differentiable too."""

    @staticmethod
    def forward(z: Tensor, k: float) -> tuple[Tensor, Tensor]:
        x = z.to(torch.float64).contiguous()
        tau = _threshold(x, k)[..., None]
        return _clip(x, tau).to(z.dtype), (x > tau) & (x - 1 < tau)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (interior,) = ctx.saved_tensors
        g = grads[0].to(_compute_dtype(grads[0])) * interior
        mean = g.sum(-1, keepdim=True) / interior.sum(-1, keepdim=True).clamp(min=1)
        return (g - mean * interior).to(grads[0].dtype), None


def _threshold(x: Tensor, k: float) -> Tensor:
    """tau of every vector along the last dimension of ``x`` (float64); -inf where it has at most k elements."""
    size = x.shape[-1]
    if k >= size:
        return x.new_full(x.shape[:-1], -math.inf)
    top = x.sort(dim=-1, descending=True).values
    count = math.ceil(k)
    kappa = top[..., count - 1]
    below = top[..., count] if count == k else kappa  # a budget that is no integer has an element inside: never hard
    event, _, slope = _events(x)
    return _settle(kappa, below, _root(event, slope, k))


def _clip(u: Tensor, tau: Tensor) -> Tensor:
    """``clip(u - tau, 0, 1)``, exactly 1 where ``tau <= u - 1``: also where both are infinite."""
    return (u - tau).clamp(0, 1).masked_fill(tau <= u - 1, 1)


# ---- Selection ------------------------------------------------------------------------------------------------------


def select(scores: Tensor, k: int, window: int) -> Selection:
    """The selection of every query.

    scores: [B, Hkv, N], floating point. k: budget, an int >= 1, may exceed N. window: an int >= 0. Equal scores: the
    smaller index wins. A score of +inf is saturated while it is selected, one of -inf loses to every other; NaN gives
    an unspecified selection. Raises TypeError or ValueError for invalid arguments.
    """
    _check_scores(scores)
    _check_int("k", k, 1)
    _check_int("window", window, 0)
    n = scores.shape[-1]
    u = scores.detach().to(torch.float64).flatten(0, 1) + 0.0  # + 0.0: no negative zeros, which some sorts tell apart
    group = max(1, BLOCK // (16 * n))
    parts = [_select_rows(rows, k, min(window, n)) for rows in u.split(group)]
    tau, *ints = (torch.cat(part).view(scores.shape) for part in zip(*parts, strict=True))
    return Selection(tau.to(_compute_dtype(scores)), *ints)


def _select_rows(u: Tensor, k: int, window: int) -> Selection:
    rows, n = u.shape
    u = u.contiguous()  # as torch.searchsorted has it
    tau = u.new_full((rows, n), -math.inf)
    tau[:, window:], kept = _scan(u[:, : n - window], k)
    position = torch.arange(n, device=u.device)
    birth = position + window
    kept = torch.nn.functional.pad(kept, (0, window))
    expiry = (torch.clamp(position, min=k) + window + kept).clamp(max=n)  # the first k queries drop nothing
    # tau is sorted: both ends are found by bisection. Beyond 2**53 u - 1 is u; then such a key goes out saturated.
    sat_end = torch.searchsorted(tau, u - 1, right=True).maximum(birth).clamp(max=n)
    sup_end = torch.searchsorted(tau, u).maximum(birth).clamp(max=n).maximum(sat_end)
    change = torch.zeros(rows, n + 1, dtype=torch.int64, device=u.device)
    change.scatter_add_(1, sat_end, torch.ones_like(sat_end)).scatter_add_(1, sup_end, -torch.ones_like(sup_end))
    interior = change.cumsum(-1)[:, :n]
    return Selection(tau, *(x.to(torch.int32) for x in (expiry, sat_end, sup_end, interior)))


def _scan(u: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Over all prefixes ``u[:, : t + 1]``: tau [rows, m], and how many prefixes with t >= k select each key [rows, m].

    Row by row the keys and the breakpoints are sorted once; a prefix is a mask over them, its ranks are a cumsum.
    """
    rows, m = u.shape
    tau = torch.full_like(u, -math.inf)
    kept = torch.zeros_like(u, dtype=torch.int64)
    if m <= k:
        return tau, kept
    order = u.sort(dim=-1, descending=True, stable=True).indices
    event, born, slope = _events(u)
    ranks = torch.tensor([k, k + 1], dtype=torch.int32, device=u.device)
    step = max(1, BLOCK // (2 * rows * m))
    for start in range(k, m, step):
        stop = min(start + step, m)
        time = torch.arange(start, stop, device=u.device)[:, None]
        near = order[order < stop].view(rows, 1, stop)
        alive = near <= time
        rank = alive.cumsum(-1, dtype=torch.int32)
        kept.scatter_add_(1, near[:, 0], (alive & (rank <= k)).sum(1))
        at = torch.searchsorted(rank, ranks.expand(rows, stop - start, 2).contiguous()).clamp(max=stop - 1)
        kappa, below = u.gather(1, near[:, 0].gather(1, at.flatten(1))).view(at.shape).unbind(-1)
        ours = born < stop
        e, b, s = (x[ours].view(rows, 1, 2 * stop) for x in (event, born, slope))
        tau[:, start:stop] = _settle(kappa, below, _root(e, s * (b <= time), k))
    return tau.cummax(-1).values, kept  # cummax: rounding must not undo what is proved


def _events(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Breakpoints of ``F(x) = sum_j clip(u_j - x, 0, 1)``, falling: value, key, change of ``-F'`` on the way down."""
    size = u.shape[-1]
    u = u.clamp(-LIMIT, LIMIT)
    event, index = torch.cat([u, u - 1], dim=-1).sort(dim=-1, descending=True)
    return event, index % size, torch.where(index < size, 1, -1).to(torch.int8)


def _root(event: Tensor, slope: Tensor, k: float) -> Tensor:
    """The largest x with ``F(x) = k``. event: falling; slope: 0 for the breakpoints of keys that do not take part.

    F is summed from the top over gap times (integer) slope. All terms are >= 0: nothing cancels, whatever the spread
    of the scores, and it is exact for scores that are multiples of a power of two.
    """
    slope = slope.cumsum(-1, dtype=torch.int32)
    mass = (slope[..., :-1] * -event.diff(dim=-1)).cumsum(-1)  # F at event[..., 1:]
    at = torch.searchsorted(mass, mass.new_full((*mass.shape[:-1], 1), k)).clamp(max=mass.shape[-1] - 1)
    excess = (mass.gather(-1, at) - k) / slope.gather(-1, at).clamp(min=1)
    return (event[..., 1:].expand_as(mass).gather(-1, at) + excess)[..., 0]


def _settle(kappa: Tensor, below: Tensor, root: Tensor) -> Tensor:
    """tau: ``kappa - 1`` where no element is inside. ``kappa``, ``below``: the k-th and the next largest elements."""
    return torch.where((kappa - 1 >= below) | (kappa.abs() > LIMIT), kappa - 1, root)


def gates(scores: Tensor, selection: Selection, window: int) -> Tensor:
    """The gates ``m_ij`` [B, Hkv, N, N] (dtype of tau) of the selected keys; zero elsewhere, inside the window too."""
    n = scores.shape[-1]
    return _selected(scores.flatten(0, 1), _rows(selection), window, 0, n)[1].view(*scores.shape, n)


def _selected(u: Tensor, s: Selection, window: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """For queries start to stop: which of the keys before ``stop`` each selects, and their gates: [rows, T, stop]."""
    i = torch.arange(start, stop, device=u.device)[:, None]
    j = torch.arange(stop, device=u.device)
    selected = (j + window <= i) & (i < s.expiry[:, None, :stop])
    gate = (u[:, None, :stop].to(s.tau.dtype) - s.tau[:, start:stop, None]).clamp(0, 1)
    return selected, gate.masked_fill_(i < s.sat_end[:, None, :stop], 1).masked_fill_(~selected, 0)


# ---- Attention ------------------------------------------------------------------------------------------------------


def sparsek_attention(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, k: int, *, window: int = 0, scale: float | None = None,
    gate: str = "kv",
) -> Tensor:  # fmt: skip
    """Causal attention over the last ``window`` keys and the ``k`` best scored before them: [B, Hq, N, D].

    query: [B, Hq, N, D]; key, value: [B, Hkv, N, D], Hq a multiple of Hkv; scores: [B, Hkv, N]. Any floating dtypes and
    device. scale: ``D ** -0.5`` if None. gate: "kv", "v" or "none". Once differentiable in all four tensors (with gate
    "none" the scores get zeros). Raises TypeError or ValueError for invalid arguments.
    """
    return _Attention.apply(query, key, value, scores, k, window, scale, gate)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out, *saved = attention_forward(*args)
        *tensors, k, window, scale, gate = args
        ctx.save_for_backward(*tensors, out, *saved)
        ctx.options = k, window, scale, gate
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, u, out, lse, *selection = ctx.saved_tensors
        grads = attention_backward(dout, q, k, v, u, out, lse, Selection(*selection), *ctx.options)
        return *grads, None, None, None, None


@torch.no_grad()
def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, k: int, window: int = 0, scale: float | None = None,
    gate: str = "kv",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output, log-sum-exp and the five tensors of the selection; arguments as for :func:`sparsek_attention`.

    out: [B, Hq, N, D] in query's dtype; lse: [B, Hq, N], natural logarithm, float64 for a float64 query, else float32.
    """
    _check_attention(query, key, value, scores, gate)
    selection = select(scores, k, window)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    q, ks, vs, u = _fold(query, key, value, scores)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    with _no_autocast(query.device):
        for rows, start, stop in _tiles(q):
            here = rows, slice(None), slice(start, stop)
            _, seen, gk, gv = _gates(u[rows], _rows(selection, rows), start, stop, window, gate, q.dtype)
            logits = (scale * _matmul(q[here], ks[rows, :stop].mT) * gk).masked_fill_(~seen, -math.inf)
            lse[here] = norm = logits.logsumexp(-1)
            out[here] = _matmul(logits.sub_(norm[..., None]).exp_().mul_(gv), vs[rows, :stop])
    return out.view(query.shape).to(query.dtype), lse.view(query.shape[:3]), *selection


@torch.no_grad()
def attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, out: Tensor, lse: Tensor,
    selection: Selection, k: int, window: int = 0, scale: float | None = None, gate: str = "kv",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and scores in closed form, from the results of :func:`attention_forward`.

    Each has the shape and dtype of its argument. With g = dL/d(gate) of the selected keys, tau's share is what every
    candidate inside ``(tau, tau + 1)`` gets, selected or not: ``-gbar``, minus the sum of g over their number.
    """
    _check_attention(query, key, value, scores, gate)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    q, ks, vs, u = _fold(query, key, value, scores)
    do, o = (x.to(q.dtype).reshape(q.shape) for x in (dout, out))
    norm = lse.to(q.dtype).reshape(q.shape[:3])
    delta = (do * o).sum(-1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(ks), torch.zeros_like(vs)
    du = torch.zeros_like(u, dtype=q.dtype)
    with _no_autocast(query.device):
        for rows, start, stop in _tiles(q):
            here = rows, slice(None), slice(start, stop)
            chosen = _rows(selection, rows)
            selected, seen, gk, gv = _gates(u[rows], chosen, start, stop, window, gate, q.dtype)
            s = scale * _matmul(q[here], ks[rows, :stop].mT)
            p = (s * gk).sub_(norm[here][..., None]).masked_fill_(~seen, -math.inf).exp_()
            dp = _matmul(do[here], vs[rows, :stop].mT)  # dL/dp without the gate of v
            ds = (dp * gv).sub_(delta[here][..., None]).mul_(p)
            dlogits = scale * ds * gk
            dq[here] = _matmul(dlogits, ks[rows, :stop])
            dk[rows, :stop] += dlogits.flatten(1, 2).mT @ q[here].flatten(1, 2)
            dv[rows, :stop] += (p * gv).flatten(1, 2).mT @ do[here].flatten(1, 2)
            if gate != "none":
                g = (p * dp + ds * s if gate == "kv" else p * dp).sum(1)
                du[rows, :stop] += _score_grad(g, selected, chosen, start, stop)
    grads = zip((dq, dk, dv, du), (query, key, value, scores), strict=True)
    # Contiguous whatever the inputs are: so the operator promises it to the compiler.
    dq, dk, dv, du = (grad.view(x.shape).to(x.dtype).contiguous() for grad, x in grads)
    return dq, dk, dv, du


def _score_grad(g: Tensor, selected: Tensor, s: Selection, start: int, stop: int) -> Tensor:
    """du [rows, stop] of one block from ``g`` [rows, T, stop], the gradient of its gates."""
    i = torch.arange(start, stop, device=g.device)[:, None]
    inside = (s.sat_end[:, None, :stop] <= i) & (i < s.sup_end[:, None, :stop])
    g = g.masked_fill(~(inside & selected), 0)
    gbar = g.sum(-1) / s.interior[:, start:stop].clamp(min=1)
    return (g - gbar[..., None] * inside).sum(1)


def _gates(
    u: Tensor, s: Selection, start: int, stop: int, window: int, gate: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which keys are selected, which are seen, the gates of k and of v; the last three with a dimension for G."""
    selected, m = _selected(u, s, window, start, stop)
    i = torch.arange(start, stop, device=u.device)[:, None]
    j = torch.arange(stop, device=u.device)
    local = (j <= i) & (j > i - window)
    m = (m.to(dtype) + local)[:, None]  # the two sets are disjoint; a window key has gate 1
    one = m.new_ones(())
    return selected, (selected | local)[:, None], m if gate == "kv" else one, m if gate != "none" else one


def _tiles(q: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Blocks of rows and queries; a temporary of a block, over all keys, has about BLOCK elements."""
    rows, g, n, _ = q.shape
    group = min(rows, max(1, BLOCK // (64 * g * n)))
    step = max(1, BLOCK // (group * g * n))
    for row in range(0, rows, group):
        for start in range(0, n, step):
            yield slice(row, row + group), start, min(start + step, n)


def _fold(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [rows, G, N, D], k and v [rows, N, D], contiguous in the dtype of computation; scores [rows, N]."""
    dtype = _compute_dtype(query)
    (n, d), rows = query.shape[2:], key.shape[0] * key.shape[1]
    q, k, v = (x.to(dtype).contiguous() for x in (query, key, value))
    return q.view(rows, -1, n, d), k.view(rows, n, d), v.view(rows, n, d), scores.reshape(rows, n)


def _rows(selection: Selection, rows: slice = slice(None)) -> Selection:
    return Selection(*(x.flatten(0, 1)[rows] for x in selection))


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """[rows, G, T, b] from x [rows, G, T, a] and y [rows, a, b]: the group is folded into T, so y is not copied."""
    return (x.flatten(1, 2) @ y).unflatten(1, x.shape[1:3])


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


# ---- Argument checks ------------------------------------------------------------------------------------------------


def _check_float(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, but is {x.dtype if isinstance(x, Tensor) else x!r}")


def _check_int(name: str, x: Any, low: int) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} must be an int, but is {x!r} of type {type(x).__name__}")
    if x < low:
        raise ValueError(f"{name} must be at least {low}, but is {x}")


def _check_scores(scores: Tensor) -> None:
    _check_float("scores", scores)
    if scores.dim() != 3 or 0 in scores.shape:
        raise ValueError(f"scores must be [B, Hkv, N], no size 0, but is of shape {list(scores.shape)}")


def _check_attention(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, gate: str) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_float(name, x)
    _check_scores(scores)
    if query.dim() != 4 or 0 in query.shape or query.shape[1] % scores.shape[1]:
        allowed = f"[B, Hq, N, D], no size 0, Hq a multiple of {scores.shape[1]} (scores' Hkv)"
        raise ValueError(f"query must be {allowed}, but is of shape {list(query.shape)}")
    (batch, _, n, d), kv = query.shape, scores.shape[1]
    full = [batch, kv, n, d]
    for name, x, shape in (("scores", scores, [batch, kv, n]), ("key", key, full), ("value", value, full)):
        if list(x.shape) != shape:
            raise ValueError(f"{name} must be of shape {shape}, but is of shape {list(x.shape)}")
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, but is {gate!r}")
