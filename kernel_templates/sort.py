"""Sorting rows of scores, falling, equal scores by rising index; and the initial values that later kernels expect.

Chunks of SORT scores are sorted in registers, each by one program, as int64 keys: the score's bits, made to run
against the score, above its index. No two keys are equal, so the rank of a key in the row is the sum of its ranks in
all sorted chunks, found by binary searches in parallel. Rows of many chunks are left to ``torch.sort``, whose radix
passes then cost less than that many searches.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAST: tl.constexpr = tl.constexpr((1 << 63) - 1)  # the key of no score: behind all others


@triton.jit
def _encode(u, t):
    """int64 keys whose ascending order is: falling score, then rising index. NaN counts as +inf, -0.0 as 0.0."""
    u = tl.where(u == 0, 0.0, tl.where(u == u, u, float("inf")))
    bits = u.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as an int, negative floats run backwards
    return ((~rising).to(tl.int64) << 32) | t.to(tl.int64)


@triton.jit
def _decode(key):
    rising = ~(key >> 32).to(tl.int32)
    score = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return score, (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _prepare(
    tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, part, parts, row, BLOCK: tl.constexpr
):  # fmt: skip
    """One part of a row's results as they are without any threshold."""
    at = tl.arange(0, BLOCK)
    for i in range(part * BLOCK, N, parts * BLOCK):
        inside = i + at < N
        never = tl.full([BLOCK], 0, tl.int32) + N
        tl.store(tau_ptr + row * N + i + at, float("-inf"), mask=inside)
        tl.store(expiry_ptr + row * N + i + at, never, mask=inside)
        tl.store(sat_end_ptr + row * N + i + at, never, mask=inside)
        tl.store(sup_end_ptr + row * N + i + at, never, mask=inside)
        tl.store(interior_ptr + row * N + i + at, 0, mask=inside)


@triton.jit(do_not_specialize=["N"])
def prepare_kernel(tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, BLOCK: tl.constexpr):
    """Initial values: tau -inf, interior 0, the three ends N [rows, N]."""
    _prepare(
        tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, tl.program_id(0), tl.num_programs(0),
        tl.program_id(1).to(tl.int64), BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M"])
def sort_kernel(
    scores_ptr, runs_ptr, us_ptr, order_ptr, tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, M,
    SORT: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Sort SORT of the first M scores of a row [rows, N] float32, and write initial values (``prepare_kernel``).

    Out: runs int32 [rows, chunks, 2, SORT], the high and the low halves of the sorted keys; with SINGLE, the only
    chunk's scores us float32 and indices order int32 [rows, M] instead.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, SORT)
    t = chunk * SORT + at
    u = tl.load(scores_ptr + row * N + t, mask=t < M, other=0.0)
    key = tl.sort(tl.where(t < M, _encode(u, t), LAST))
    if SINGLE:
        score, index = _decode(key)
        tl.store(us_ptr + row * M + at, score, mask=at < M)
        tl.store(order_ptr + row * M + at, index, mask=at < M)
    else:
        runs_ptr += (row * tl.num_programs(0) + chunk) * 2 * SORT
        tl.store(runs_ptr + at, (key >> 32).to(tl.int32))
        tl.store(runs_ptr + SORT + at, (key & 0xFFFFFFFF).to(tl.int32))
    _prepare(
        tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, chunk, tl.num_programs(0), row, SORT
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "chunks"])
def merge_kernel(
    runs_ptr, us_ptr, order_ptr, M, chunks, SORT: tl.constexpr, LOG: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scatter the keys of sorted chunks, runs [rows, chunks, 2, SORT], by rank: us float32 and order int32 [rows, M].

    Only high halves are compared: of equal scores those of earlier chunks have the lower indices.
    """
    row = tl.program_id(1).to(tl.int64)
    runs_ptr += row * chunks * 2 * SORT
    own = tl.program_id(0) * BLOCK // SORT
    place = tl.program_id(0) * BLOCK % SORT + tl.arange(0, BLOCK)
    high = tl.load(runs_ptr + own * 2 * SORT + place)
    low = tl.load(runs_ptr + own * 2 * SORT + SORT + place)
    # Keys along the lanes: neighbours probe the same cache lines. Positions count from the row's start, so that a step
    # is a load, a comparison and an addition; columns without a chunk search the last one, for nothing.
    c = tl.arange(0, CHUNKS)[:, None]
    bound = high[None, :] + (c < own).to(tl.int32)
    start = tl.minimum(c, chunks - 1) * 2 * SORT
    at = start + tl.zeros([CHUNKS, BLOCK], tl.int32)
    for bit in tl.static_range(1, LOG + 1):
        probe = tl.load(runs_ptr + (at + ((SORT >> bit) - 1)))
        at = tl.where(probe < bound, at + (SORT >> bit), at)
    at += (tl.load(runs_ptr + at) < bound).to(tl.int32)
    rank = place + tl.sum(tl.where((c < chunks) & (c != own), at - start, 0), 0)
    live = high < 0x7FFFFFFF
    score, index = _decode((high.to(tl.int64) << 32) | low.to(tl.int64))
    tl.store(us_ptr + row * M + rank, score, mask=live)
    tl.store(order_ptr + row * M + rank, index, mask=live)
