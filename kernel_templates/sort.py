"""Sorting rows of scores, falling, equal scores by rising index; and the initial values that later kernels expect.

Runs of SORT scores are sorted in registers, each by one program, as int64 keys: the score's bits, made to run against
the score, above its index. Then RUNS runs at a time are merged, in rounds: the rank of a key is the sum of its ranks in
all of them, found by binary searches in parallel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .filter import length

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
    tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, size, part, parts, row, BLOCK: tl.constexpr
):  # fmt: skip
    """One part of the first ``size`` of a row's results as they are without any threshold."""
    at = tl.arange(0, BLOCK)
    for i in range(part * BLOCK, size, parts * BLOCK):
        inside = i + at < size
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
        tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, N, tl.program_id(0),
        tl.num_programs(0), tl.program_id(1).to(tl.int64), BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M", "rows"])
def sort_kernel(
    scores_ptr, count_ptr, us_ptr, order_ptr, tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, M, rows,
    SORT: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Sort every run of SORT of the first M scores of a row [rows, N] float32; write initial values
    (``prepare_kernel``). Out: scores us float32 and indices order int32 [rows, M].

    Here and in all that follow, COUNTED says that a row has count int32 [rows] entries, with room for M (and N = M):
    programs past its end have nothing to do. So rows run fastest, and those that have something start first, together.
    """
    run = tl.program_id(0) // rows
    row = (tl.program_id(0) % rows).to(tl.int64)
    m = length(count_ptr, row, M, COUNTED)
    if run * SORT >= m:
        return
    t = run * SORT + tl.arange(0, SORT)
    u = tl.load(scores_ptr + row * N + t, mask=t < m, other=0.0)
    score, index = _decode(tl.sort(tl.where(t < m, _encode(u, t), LAST)))
    tl.store(us_ptr + row * M + t, score, mask=t < m)
    tl.store(order_ptr + row * M + t, index, mask=t < m)
    size = m if COUNTED else N
    _prepare(
        tau_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, interior_ptr, N, size, run, tl.cdiv(m, SORT), row, SORT
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows"])
def merge_kernel(
    us_ptr, order_ptr, to_us_ptr, to_order_ptr, count_ptr, M, rows, LOG_RUN: tl.constexpr, RUNS: tl.constexpr,
    BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Merge every RUNS sorted runs of 2^LOG_RUN entries, us float32 and order int32 [rows, M], into one run.

    Only scores are compared: of equal ones those of earlier runs have the lower indices.
    """
    row = (tl.program_id(0) % rows).to(tl.int64)
    begin = tl.program_id(0) // rows * BLOCK
    m = length(count_ptr, row, M, COUNTED)
    if begin >= m:
        return
    at = begin + tl.arange(0, BLOCK)
    live = at < m
    u = tl.load(us_ptr + row * M + at, mask=live, other=0.0)
    own = begin >> LOG_RUN
    rank = (own // RUNS * RUNS << LOG_RUN) + (at & ((1 << LOG_RUN) - 1))
    for other in tl.static_range(1, RUNS):
        run = own ^ other
        if run << LOG_RUN < m:
            before = (run << LOG_RUN) + tl.zeros([BLOCK], tl.int32)
            for bit in tl.static_range(LOG_RUN + 1):
                step = 1 << (LOG_RUN - bit)
                probe = before + (step - 1)
                inside = probe < tl.minimum((run + 1) << LOG_RUN, m)
                v = tl.load(us_ptr + row * M + probe, mask=live & inside, other=float("-inf"))
                ahead = inside & ((v > u) | ((v == u) & (run < own)))
                before = tl.where(ahead, before + step, before)
            rank += before - (run << LOG_RUN)
    tl.store(to_us_ptr + row * M + rank, u, mask=live)
    tl.store(to_order_ptr + row * M + rank, tl.load(order_ptr + row * M + at, mask=live, other=0), mask=live)
