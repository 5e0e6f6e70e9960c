"""The filter of ``threshold``: most keys that no query selects are left out before anything is sorted.

tau never falls. So where ``F(x) >= k`` for some prefix, x is a lower bound of every later tau, and a key born later
with ``u <= x`` is dropped at its birth: at least k keys are above x, and the gate is 0. It is enough that part of the
prefix has ``F(x) >= k``. Bounds are found for prefixes of 2k, 4k, 8k, ... keys: of scores without a trend about 1.3k
keys are left between one and the next. And, for scores that rise, from what was born lately, all along the row.

What is left is a shorter row, of which the threshold is solved as of any other, with every key's place in it for its
time; ``expand_kernel`` puts the results back. Nothing that it leaves out ever counts: the results are the same, but for
the unit of the fixed point, which follows from the scores that are left (a key within a unit of tau may differ).
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR: tl.constexpr = tl.constexpr(4194304.0)  # more than any two clamped scores are apart
LATELY: tl.constexpr = tl.constexpr(4)  # strides that count as lately: fewer have no k above a good bound
POINTS: tl.constexpr = tl.constexpr(4)  # at which a pass over a prefix finds F: as long as at one of them
REACH: tl.constexpr = tl.constexpr(1 << POINTS.value)  # each is twice as far as the one before
STEPS: tl.constexpr = tl.constexpr(3)  # of search between them: each key left too many costs little
# Of F: more than float32 may be off. Fixed point may be off by a unit for each key, which moves tau by a unit.
SLACK: tl.constexpr = tl.constexpr(1.015625)
PARTS: tl.constexpr = tl.constexpr(4)  # of a prefix, each looked into by a program of its own


@triton.jit
def clamp(u):
    """The scores that count: fixed point holds no more."""
    return tl.maximum(tl.minimum(u, 1048576.0), -1048576.0)


@triton.jit
def length(count_ptr, row, M, COUNTED: tl.constexpr):
    """The entries of a row with room for M: as many as counted, else M."""
    m = M
    if COUNTED:
        m = tl.load(count_ptr + row)
    return m


@triton.jit
def before(counts_ptr, block, BLOCK: tl.constexpr):
    """The sum of the first ``block`` counts: a few loads, unless there are millions of keys."""
    at = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.int32)
    for i in range(0, block, BLOCK):
        sums += tl.load(counts_ptr + i + at, mask=i + at < block, other=0)
    return tl.sum(sums, 0)


@triton.jit
def _narrow(scores_ptr, x, low, high, first, end, goal, BLOCK: tl.constexpr):
    """The largest of low and those of x [POINTS] where F of scores [first, end) reaches the goal, up to rounding; the
    least of high and those where it does not."""
    at = tl.arange(0, BLOCK)[:, None]
    mass = tl.zeros([BLOCK, POINTS], tl.float32)
    for i in range(first, end, BLOCK):
        inside = i + at < end
        u = clamp(tl.load(scores_ptr + i + at, mask=inside, other=0.0))
        mass += tl.where(inside, tl.minimum(tl.maximum(u - x[None, :], 0.0), 1.0), 0.0)
    enough = tl.sum(mass, 0) >= goal
    low = tl.maximum(low, tl.max(tl.where(enough, x, low), 0))
    high = tl.minimum(high, tl.min(tl.where(enough, high, x), 0))
    return low, high


@triton.jit(do_not_specialize=["K", "bounds", "stride"])
def bounds_kernel(scores_ptr, bounds_ptr, N, K, bounds, stride, BLOCK: tl.constexpr):
    """Lower bounds of tau, of scores [rows, N]: float32 [rows, bounds * PARTS + recent], axis 1 by axis 0.

    First, for each a, PARTS of which the least is a bound after the first 2K << a keys: where each part of a prefix
    has its part of K above its own x, all have K above the least x. One program for all parts would take longer than
    the few keys cost that this leaves too many. Then, for each i, the bound that LATELY * stride keys from i * stride
    on make.
    """
    row = tl.program_id(1).to(tl.int64)
    which = tl.program_id(0)
    scores_ptr += row * N
    if which < bounds * PARTS:
        size = (2 * K << (which // PARTS)).to(tl.int64)
        first = (size * (which % PARTS) // PARTS).to(tl.int32)
        end = (size * (which % PARTS + 1) // PARTS).to(tl.int32)
        goal = K.to(tl.float32) * (SLACK / PARTS)
    else:
        first = (which - bounds * PARTS) * stride
        end = first + LATELY * stride
        goal = K.to(tl.float32) * SLACK
    at = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -1048576.0, tl.float32)
    for i in range(first, end, BLOCK):
        most = tl.maximum(most, clamp(tl.load(scores_ptr + i + at, mask=i + at < end, other=-1048576.0)))
    top = tl.max(most, 0)
    point = tl.arange(0, POINTS)
    low = top - 2 * FAR
    high = top
    gap = top * 0 + 1
    while (gap < FAR) & (low < top - FAR):
        x = top - gap * (1 << point).to(tl.float32)
        low, high = _narrow(scores_ptr, x, low, high, first, end, goal, BLOCK)
        gap *= REACH
    for _ in range(STEPS):
        x = low + (high - low) * ((point + 1).to(tl.float32) / (POINTS + 1))
        low, high = _narrow(scores_ptr, x, low, high, first, end, goal, BLOCK)
    tl.store(bounds_ptr + row * tl.num_programs(0) + which, low)


@triton.jit
def _kept(scores_ptr, bounds_ptr, t, K, M, bounds, stride):
    """Scores of keys t, and which of them the bounds leave."""
    inside = t < M
    u = tl.load(scores_ptr + t, mask=inside, other=0.0)
    recent = t // stride - LATELY
    bound = tl.load(bounds_ptr + bounds * PARTS + recent, mask=inside & (recent >= 0), other=-FAR)
    for a in range(bounds):
        lowest = tl.min(tl.load(bounds_ptr + a * PARTS + tl.arange(0, PARTS)), 0)
        bound = tl.maximum(bound, tl.where(t >= (2 * K << a), lowest, bound))
    return u, inside & ~(clamp(u) <= bound)


@triton.jit(do_not_specialize=["K", "M", "bounds", "stride", "total"])
def count_kernel(scores_ptr, bounds_ptr, counts_ptr, N, M, K, bounds, stride, total, BLOCK: tl.constexpr):
    """How many keys are left of each block: int32 [rows, blocks]."""
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, kept = _kept(scores_ptr + row * N, bounds_ptr + row * total, t, K, M, bounds, stride)
    tl.store(counts_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))


@triton.jit(do_not_specialize=["K", "M", "bounds", "stride", "total"])
def compact_kernel(
    scores_ptr, bounds_ptr, counts_ptr, left_ptr, key_ptr, index_ptr, count_ptr, N, M, K, bounds, stride, total,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys that are left, by position.

    Out: their scores float32 and positions int32 [rows, M], their number int32 [rows]; index int32 [rows, M]: of every
    key how many up to it are left, negative where it is not one of them.
    """
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    t = block * BLOCK + at
    u, kept = _kept(scores_ptr + row * N, bounds_ptr + row * total, t, K, M, bounds, stride)
    upto = before(counts_ptr + row * tl.num_programs(0), block, BLOCK) + tl.cumsum(kept.to(tl.int32), 0)
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
