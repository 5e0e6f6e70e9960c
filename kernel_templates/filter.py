"""The filter of ``threshold``: keys that no query selects are left out before anything is sorted.

tau never falls. So where ``F(x) >= k`` for some prefix, x is a lower bound of every later tau, and a key born later
with ``u <= x`` is dropped at its birth: at least k keys are above x, and the gate is 0. Bounds are found for prefixes
of 2k, 4k, 8k, ... keys. Of scores without a trend about 1.3k keys are left between one and the next.

What is left is a shorter row, of which the threshold is solved as of any other, with every key's place in it for its
time; ``expand_kernel`` puts the results back. Nothing that it leaves out ever counts: the results are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR: tl.constexpr = tl.constexpr(4194304.0)  # more than any two clamped scores are apart
STEPS: tl.constexpr = tl.constexpr(7)  # of bisection: each key left too many costs little
SLACK: tl.constexpr = tl.constexpr(1.015625)  # of F, above what float32 and fixed point may be off
PARTS: tl.constexpr = tl.constexpr(4)  # of a prefix, each looked into by a program of its own


@triton.jit
def _clamp(u):
    return tl.maximum(tl.minimum(u, 1048576.0), -1048576.0)


@triton.jit
def length(count_ptr, row, M, COUNTED: tl.constexpr):
    """The entries of a row with room for M: as many as counted, else M."""
    m = M
    if COUNTED:
        m = tl.load(count_ptr + row)
    return m


@triton.jit
def _mass(scores_ptr, x, first, end, BLOCK: tl.constexpr):
    """F(x) of scores [first, end), up to rounding."""
    at = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for i in range(first, end, BLOCK):
        inside = i + at < end
        u = _clamp(tl.load(scores_ptr + i + at, mask=inside, other=0.0))
        mass += tl.where(inside, tl.minimum(tl.maximum(u - x, 0.0), 1.0), 0.0)
    return tl.sum(mass, 0)


@triton.jit(do_not_specialize=["K"])
def bounds_kernel(scores_ptr, bounds_ptr, N, K, BLOCK: tl.constexpr):
    """Lower bounds of tau after the first 2K << a keys, a on axis 1: float32 [rows, bounds, PARTS], scores [rows, N].

    The least of an a's is one: where each part of a prefix has its part of K above its own x, all have K above the
    least x. One program for all parts would take longer than the few keys cost that this leaves too many.
    """
    row = tl.program_id(2).to(tl.int64)
    a = tl.program_id(1)
    part = tl.program_id(0)
    scores_ptr += row * N
    first = ((2 * K << a).to(tl.int64) * part // PARTS).to(tl.int32)
    end = ((2 * K << a).to(tl.int64) * (part + 1) // PARTS).to(tl.int32)
    goal = K.to(tl.float32) * (SLACK / PARTS)
    at = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -1048576.0, tl.float32)
    for i in range(first, end, BLOCK):
        most = tl.maximum(most, _clamp(tl.load(scores_ptr + i + at, mask=i + at < end, other=-1048576.0)))
    top = tl.max(most, 0)
    gap = top * 0 + 1
    while (gap < FAR) & (_mass(scores_ptr, top - gap, first, end, BLOCK) < goal):
        gap *= 2
    low = top - gap
    high = tl.where(gap > 1, top - gap / 2, top)
    for _ in range(STEPS):
        middle = (low + high) / 2
        enough = _mass(scores_ptr, middle, first, end, BLOCK) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    tl.store(bounds_ptr + (row * tl.num_programs(1) + a) * PARTS + part, low)


@triton.jit
def _kept(scores_ptr, bounds_ptr, t, K, M, bounds):
    """Scores of keys t, and which of them the bounds leave."""
    inside = t < M
    u = tl.load(scores_ptr + t, mask=inside, other=0.0)
    bound = tl.zeros_like(u) - FAR
    for a in range(bounds):
        lowest = tl.min(tl.load(bounds_ptr + a * PARTS + tl.arange(0, PARTS)), 0)
        bound = tl.maximum(bound, tl.where(t >= (2 * K << a), lowest, bound))
    return u, inside & ~(_clamp(u) <= bound)


@triton.jit(do_not_specialize=["K", "M", "bounds"])
def count_kernel(scores_ptr, bounds_ptr, counts_ptr, N, M, K, bounds, BLOCK: tl.constexpr):
    """How many keys are left of each block: int32 [rows, blocks]."""
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, kept = _kept(scores_ptr + row * N, bounds_ptr + row * bounds * PARTS, t, K, M, bounds)
    tl.store(counts_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))


@triton.jit(do_not_specialize=["K", "M", "bounds"])
def compact_kernel(
    scores_ptr, bounds_ptr, counts_ptr, left_ptr, key_ptr, index_ptr, count_ptr, N, M, K, bounds, BLOCK: tl.constexpr
):
    """The keys that are left, by position.

    Out: their scores float32 and positions int32 [rows, M], their number int32 [rows]; index int32 [rows, M]: of every
    key how many up to it are left, negative where it is not one of them.
    """
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    counts_ptr += row * tl.num_programs(0)
    before = tl.zeros([BLOCK], tl.int32)
    for i in range(0, block, BLOCK):
        before += tl.load(counts_ptr + i + at, mask=i + at < block, other=0)
    t = block * BLOCK + at
    u, kept = _kept(scores_ptr + row * N, bounds_ptr + row * bounds * PARTS, t, K, M, bounds)
    upto = tl.sum(before, 0) + tl.cumsum(kept.to(tl.int32), 0)
    tl.store(left_ptr + row * M + upto - 1, u, mask=kept)
    tl.store(key_ptr + row * M + upto - 1, t, mask=kept)
    tl.store(index_ptr + row * M + t, tl.where(kept, upto, -upto), mask=t < M)
    tl.store(count_ptr + row + at * 0, upto, mask=t == M - 1)


@triton.jit
def _when(end_ptr, key_ptr, place, kept, t, m, N, shift):
    """The query at which a key of that place changes: at its birth where it was left out, N for never."""
    end = tl.load(end_ptr + place, mask=kept, other=0)
    inside = kept & (end < m)
    query = tl.load(key_ptr + end, mask=inside, other=0) + shift
    return tl.where(inside, query, tl.where(kept, N, t + shift))


@triton.jit(do_not_specialize=["K", "M", "N", "shift"])
def expand_kernel(
    key_ptr, index_ptr, count_ptr, left_tau_ptr, left_expiry_ptr, left_sat_end_ptr, left_sup_end_ptr,
    left_interior_ptr, tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, M, K, shift, BLOCK: tl.constexpr,
):  # fmt: skip
    """The results [rows, N] of all keys from those [rows, M] of the keys that are left."""
    row = tl.program_id(1).to(tl.int64)
    m = tl.load(count_ptr + row)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < N
    index = tl.load(index_ptr + row * M + t, mask=t < M, other=0)
    kept = index > 0
    place = tl.maximum(tl.abs(index) - 1, 0)
    key_ptr += row * M
    out = row * N + t
    end = tl.where(t < M, _when(left_expiry_ptr + row * M, key_ptr, place, kept, t, m, N, shift), N)
    tl.store(expiry_ptr + out, end, mask=inside)
    end = tl.where(t < M, _when(left_sat_end_ptr + row * M, key_ptr, place, kept, t, m, N, shift), N)
    tl.store(sat_end_ptr + out, end, mask=inside)
    end = tl.where(t < M, _when(left_sup_end_ptr + row * M, key_ptr, place, kept, t, m, N, shift), N)
    tl.store(sup_end_ptr + out, end, mask=inside)
    # The queries: prefix t is query t + shift's.
    solved = (t >= K) & (t < M)
    tau = tl.load(left_tau_ptr + row * M + place, mask=solved, other=0.0)
    interior = tl.load(left_interior_ptr + row * M + place, mask=solved, other=0)
    tl.store(tau_ptr + out + shift, tl.where(solved, tau, float("-inf")), mask=t < M)
    tl.store(interior_ptr + out + shift, interior, mask=t < M)
    tl.store(tau_ptr + out, float("-inf"), mask=t < shift)
    tl.store(interior_ptr + out, 0, mask=t < shift)
