"""The operators again, from their definitions and by other means than ``sparsek_tune.reference``: slow, exact, small.

Thresholds are solved in rational arithmetic, one prefix at a time, so every boundary is decided, not rounded; streams
run on heaps; gradients come from autograd through a dense formulation in which tau is a function of the scores.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

# Scores of every character: ties, boundaries hit exactly, one-way orders, spreads.
KINDS = {
    "normal": lambda g, shape: torch.randn(shape, generator=g, dtype=torch.float64),
    "equal": lambda g, shape: torch.full(shape, 0.25, dtype=torch.float64),
    "integer": lambda g, shape: torch.randint(-2, 3, shape, generator=g).double(),
    "quarters": lambda g, shape: torch.randint(-6, 7, shape, generator=g).double() / 4,
    "rising": lambda g, shape: torch.randn(shape, generator=g, dtype=torch.float64).sort(-1).values,
    "falling": lambda g, shape: torch.randn(shape, generator=g, dtype=torch.float64).sort(-1, descending=True).values,
    "rising_steps": lambda g, shape: (torch.arange(shape[-1]).double() / 2).floor().expand(shape).contiguous(),
    "huge": lambda g, shape: 1e4 * torch.randn(shape, generator=g, dtype=torch.float64),
    "tiny": lambda g, shape: 1e-6 * torch.randn(shape, generator=g, dtype=torch.float64),
    "zeros": lambda g, shape: torch.zeros(shape, dtype=torch.float64).copysign(torch.randn(shape, generator=g)),
}


def make_scores(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return KINDS[kind](torch.Generator().manual_seed(seed), shape)


def make_qkv(batch: int, heads: int, g: int, n: int, d: int, seed: int = 0, dtype=torch.float64) -> list[Tensor]:
    """query, key, value and a gradient of the output."""
    gen = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads * g, n, d), (batch, heads, n, d), (batch, heads, n, d), (batch, heads * g, n, d)]
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def assert_close(got: Tensor, want: Tensor, tol: float, what: str = "") -> None:
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    error = (got - want).norm() / want.norm().clamp(min=1e-30) if want.any() else got.abs().max()
    assert error <= tol, f"{what}: relative error {error:.2e} > {tol:.0e}"


def threshold(z: list[Fraction], k: int) -> Fraction | None:
    """The root of ``sum(clip(z - tau, 0, 1)) = k``, the largest one; None where z has at most k elements.

    Tries every split of the sorted z into saturated, inside and zero until one is consistent with its own root.
    """
    if len(z) <= k:
        return None
    z = sorted(z, reverse=True)
    size = len(z)
    if z[k - 1] - 1 >= z[k]:
        return z[k - 1] - 1
    for saturated in range(k):
        inside = sum(z[saturated : k - 1], Fraction(0))
        for support in range(k, size + 1):
            inside += z[support - 1]
            tau = (inside + saturated - k) / (support - saturated)
            if z[support - 1] <= tau or z[saturated] - 1 >= tau:
                continue
            if (saturated == 0 or z[saturated - 1] - 1 >= tau) and (support == size or z[support] <= tau):
                return tau
    raise AssertionError("no consistent split")


@dataclass
class Prefixes:
    """Everything that one row of scores selects. tau: [N] float64; the masks: bool [N, N], query by key."""

    tau: Tensor
    selected: Tensor
    saturated: Tensor
    inside: Tensor


def prefixes(u: Tensor, k: int, window: int) -> Prefixes:
    """Every query of the row ``u`` [N] (taken as exact) by itself: sort its candidates, solve, compare."""
    exact = [Fraction(x) for x in u.tolist()]
    n = len(exact)
    tau = [-math.inf] * n
    selected, saturated, inside = (torch.zeros(n, n, dtype=torch.bool) for _ in range(3))
    for i in range(n):
        keys = range(max(0, i - window + 1))
        best = sorted(keys, key=lambda j: (-exact[j], j))[:k]
        root = threshold([exact[j] for j in keys], k)
        selected[i, best] = True
        if root is not None:
            tau[i] = float(root)
        for j in keys:
            saturated[i, j] = root is None or exact[j] - root >= 1
            inside[i, j] = root is not None and 0 < exact[j] - root < 1
    return Prefixes(torch.tensor(tau, dtype=torch.float64), selected, saturated, inside)


def first_queries(p: Prefixes, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """expiry, sat_end, sup_end by key and interior by query, read off the masks [N] (int32)."""
    n = len(p.tau)

    def first(ended: Tensor) -> Tensor:
        ends = [[i for i in range(j + window, n) if ended[i, j]] for j in range(n)]
        return torch.tensor([e[0] if e else n for e in ends], dtype=torch.int32)

    zero = ~(p.saturated | p.inside)
    return first(~p.selected), first(~p.saturated), first(zero), p.inside.sum(-1).to(torch.int32)


def stream_tau(u: list[float], k: int) -> list[float]:
    """tau after each element of ``u``: two heaps, the saturated and the inside; an element moves at most twice."""
    saturated: list[Fraction] = []
    inside: list[Fraction] = []
    total, tau, out = Fraction(0), -math.inf, []
    for x in map(Fraction, u):
        if x >= tau + 1:
            heapq.heappush(saturated, x)
        elif x > tau:
            heapq.heappush(inside, x)
            total += x
        while len(saturated) + len(inside) > k:
            root = (total + len(saturated) - k) / len(inside) if inside else math.inf
            leaves_cap = saturated[0] - 1 if saturated else math.inf
            leaves_support = inside[0] if inside else math.inf
            if root <= leaves_cap and root < leaves_support:
                tau = root
                break
            if leaves_cap < leaves_support:
                x = heapq.heappop(saturated)
                heapq.heappush(inside, x)
                total += x
            else:
                total -= heapq.heappop(inside)
        else:  # k are left, all saturated: the root is an interval, up to where the first of them leaves
            if len(out) >= k:
                tau = max(tau, min(saturated[:1] + inside[:1]) - 1)
        out.append(tau)
    return [float(x) for x in out]


def stream_expiry(u: list[float], k: int, window: int) -> list[int]:
    """expiry by key: a heap of the k best so far gives up its least element, the latest among equals."""
    n = len(u)
    expiry, heap = [n] * n, []
    for j in range(n - window):
        heapq.heappush(heap, (u[j], -j))
        if len(heap) > k:
            expiry[-heapq.heappop(heap)[1]] = j + window
    return expiry


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, k: int, window: int, scale: float, gate: str
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, N, D] and lse [B, Hq, N], N x N, differentiable in all tensors by autograd.

    The masks are constants; tau is ``(sum of the scores inside + saturated - k) / number inside``.
    """
    n = query.shape[2]
    rows = [prefixes(u, k, window) for u in scores.detach().flatten(0, 1)]
    masks = ([p.selected for p in rows], [p.saturated for p in rows], [p.inside for p in rows])
    selected, saturated, inside = (torch.stack(x).view(*scores.shape, n) for x in masks)
    u = scores[:, :, None, :]
    tau = ((u * inside).sum(-1) + saturated.sum(-1) - k) / inside.sum(-1).clamp(min=1)
    m = torch.where(saturated, 1.0, torch.where(inside, u - tau[..., None], 0.0))
    i = torch.arange(n)
    local = (i <= i[:, None]) & (i > i[:, None] - window)
    m = torch.where(local, 1.0, m)
    gate_k, gate_v = m if gate == "kv" else torch.ones_like(m), m if gate != "none" else torch.ones_like(m)
    group = query.shape[1] // key.shape[1]
    key, value, gate_k, gate_v, seen = (
        x.repeat_interleave(group, dim=1) for x in (key, value, gate_k, gate_v, selected | local)
    )
    logits = (gate_k * (scale * query @ key.mT)).masked_fill(~seen, -math.inf)
    return (gate_v * logits.softmax(-1)) @ value, logits.logsumexp(-1)


def finite_difference(f, x: Tensor, at: tuple[int, ...], step: float) -> float:
    """Central difference of the scalar function f at ``x`` in the coordinate ``at``."""
    ahead, back = x.detach().clone(), x.detach().clone()
    ahead[at] += step
    back[at] -= step
    return float(f(ahead) - f(back)) / (2 * step)
