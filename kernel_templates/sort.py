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
    tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, table_ptr, N, cells, part, parts, row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of a row's results as they are without any threshold, and of its zeros of the table."""
    at = tl.arange(0, BLOCK)
    for i in range(part * BLOCK, N, parts * BLOCK):
        inside = i + at < N
        never = tl.full([BLOCK], 0, tl.int32) + N
        tl.store(tau_ptr + row * N + i + at, float("-inf"), mask=inside)
        tl.store(expiry_ptr + row * N + i + at, never, mask=inside)
        tl.store(sat_end_ptr + row * N + i + at, never, mask=inside)
        tl.store(sup_end_ptr + row * N + i + at, never, mask=inside)
        tl.store(interior_ptr + row * N + i + at, 0, mask=inside)
    for i in range(part * BLOCK, cells, parts * BLOCK):
        tl.store(table_ptr + row * cells + i + at, tl.zeros([BLOCK], tl.int64), mask=i + at < cells)


@triton.jit(do_not_specialize=["N", "cells"])
def prepare_kernel(
    tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, table_ptr, N, cells, BLOCK: tl.constexpr
):  # fmt: skip
    """Initial values: tau -inf, interior 0, the three ends N [rows, N]; table [rows, cells] int64 zeros."""
    _prepare(
        tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, table_ptr, N, cells, tl.program_id(0),
        tl.num_programs(0), tl.program_id(1).to(tl.int64), BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M", "cells"])
def sort_kernel(
    scores_ptr, sorted_ptr, us_ptr, order_ptr, tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, table_ptr,
    N, M, cells, SORT: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Sort SORT of the first M scores of a row [rows, N] float32, and write initial values (``prepare_kernel``).

    Out: keys, sorted int64 [rows, chunks, SORT]; with SINGLE, the only chunk's scores us float32 and indices order
    int32 [rows, M] instead.
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
        tl.store(sorted_ptr + (row * tl.num_programs(0) + chunk) * SORT + at, key)
    _prepare(
        tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, table_ptr, N, cells, chunk, tl.num_programs(0),
        row, SORT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "chunks"])
def merge_kernel(
    sorted_ptr, us_ptr, order_ptr, M, chunks, SORT: tl.constexpr, LOG: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scatter the keys of sorted chunks [rows, chunks, SORT] by rank: us float32 and order int32 [rows, M]."""
    row = tl.program_id(1).to(tl.int64)
    sorted_ptr += row * chunks * SORT
    key = tl.load(sorted_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    c = tl.arange(0, CHUNKS)[:, None]  # keys along the lanes: neighbours probe the same cache lines
    below = tl.zeros([CHUNKS, BLOCK], tl.int32)
    for bit in tl.static_range(LOG + 1):
        more = below + (SORT >> bit)
        probe = tl.load(sorted_ptr + c * SORT + more - 1, mask=(c < chunks) & (more <= SORT), other=LAST)
        below = tl.where(probe < key[None, :], more, below)
    rank = tl.sum(below, 0)
    score, index = _decode(key)
    live = key < LAST
    tl.store(us_ptr + row * M + rank, score, mask=live)
    tl.store(order_ptr + row * M + rank, index, mask=live)
