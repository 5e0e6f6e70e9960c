"""Backward with respect to key, value and score: key-major, one partial row per (segment, key), then an ordered sum.

A program owns BN entries of one segment's list and walks the segment's queries; nothing is added atomically, so the
result is the same bit for bit on every run. The reduction walks the segments of each key in order and finds the key's
entry in each: by ``stop`` where it was born, by ``start`` where it was dropped, by a search (parts 2 and 3 of a list
are ordered by position) in between. The tau term of a score's gradient is a difference of one prefix sum of gbar
(design fact 3).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .base import DTYPE_BYTES, Choice, Config, Cost, Param, Pow2, Template, next_pow2
from .forward import pairs
from .tiles import (
    GATE_KV,
    GATE_NONE,
    LOG2E,
    bound,
    default_tile,
    distance,
    gate,
    gated_grads,
    interval,
    load_rows,
    mma_cost,
    store_rows,
    tile_error,
)
from .tiles import __file__ as tiles_file

CHUNK = 1024  # of the prefix sums of gbar
PROBES: tl.constexpr = tl.constexpr(32)  # of one step of the search for a key's entry
AHEAD: tl.constexpr = tl.constexpr(4)  # segments of a key whose entries are found at a time, and then read together

PLAIN = tl.constexpr(0)  # every key of the tile is seen by every query, with a gate of 1
GATED = tl.constexpr(1)  # seen by every query
MASKED = tl.constexpr(2)


@triton.jit
def _query_tiles(
    dk, dv, du, k, v, u, born, until, sat_end, begin, end, begin2, end2, q_ptr, do_ptr, lse_ptr, delta_ptr, tau_ptr,
    sq_n, sq_h, sdo_n, sdo_h, N, scale, KIND: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Add what queries [begin, end), whole tiles, and [begin2, end2) give to dk / scale, dv and du's direct part."""
    BQ: tl.constexpr = BM // HEADS
    m = tl.arange(0, BM)
    h = m % HEADS
    log_scale = scale * LOG2E
    before = tl.cdiv(end - begin, BQ)
    for step in range(0, before + tl.cdiv(end2 - begin2, BQ)):
        first = tl.where(step < before, begin + step * BQ, begin2 + (step - before) * BQ)
        i = first + m // HEADS
        ok = h < G
        if KIND == MASKED:
            ok = (i < end2) & ok
        token = i
        sub = h
        if WIDE:
            token = i.to(tl.int64)
            sub = h.to(tl.int64)
        q = load_rows(q_ptr, token * sq_n + sub * sq_h, 1, ok, D, BD, WIDE)
        do = load_rows(do_ptr, token * sdo_n + sub * sdo_h, 1, ok, D, BD, WIDE)
        # Rows of no head read do = 0 and delta = 0 and add nothing; those past the end are masked.
        lse = tl.load(lse_ptr + h * N + i, mask=ok, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + h * N + i, mask=ok, other=0.0)[None, :]
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        logit = s * log_scale
        if KIND != PLAIN and GATE != GATE_NONE:
            tau = tl.load(tau_ptr + i, mask=ok, other=0.0)
            g = gate(u[:, None], tau[None, :])
            if GATE == GATE_KV:
                logit = logit * g
        logit -= lse[None, :]
        if KIND == MASKED:
            middle, half = interval(born, until, first)
            logit = tl.minimum(logit, bound(distance(i, first)[None, :], middle[:, None], half[:, None]))
        a = tl.exp2(logit)
        if KIND == PLAIN or GATE == GATE_NONE:
            dv = tl.dot(a.to(do.dtype), do, dv, input_precision="ieee")
            ds = a * (dp - delta)
        else:
            dv = tl.dot((a * g).to(do.dtype), do, dv, input_precision="ieee")
            ds, dm = gated_grads(a, g, s, dp, delta, scale, GATE)
            du += tl.sum(tl.where(i[None, :] >= sat_end[:, None], dm, 0.0), 1)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv, du


@triton.jit
def _key_tile(
    k, v, u, born, until, sat_end, begin, end, q_ptr, do_ptr, lse_ptr, delta_ptr, tau_ptr, sq_n, sq_h, sdo_n, sdo_h,
    N, scale, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk / scale, dv and the direct part of du of BN keys over queries [begin, end), where born <= i < until."""
    BQ: tl.constexpr = BM // HEADS
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    du = tl.zeros([BN], tl.float32)
    until = tl.minimum(until, end)
    # Whole tiles of queries that see every key: saturated in [clear, gated), gated in [gated, masked).
    clear = tl.minimum(begin + tl.cdiv(tl.maximum(tl.max(born, 0) - begin, 0), BQ) * BQ, end)
    masked = clear + tl.maximum(tl.min(until, 0) - clear, 0) // BQ * BQ
    gated = masked
    if GATE != GATE_NONE:
        gated = tl.minimum(clear + tl.maximum(tl.min(sat_end, 0) - clear, 0) // BQ * BQ, masked)
    dk, dv, du = _query_tiles(
        dk, dv, du, k, v, u, born, until, sat_end, clear, gated, 0, 0, q_ptr, do_ptr, lse_ptr, delta_ptr, tau_ptr,
        sq_n, sq_h, sdo_n, sdo_h, N, scale, PLAIN, G, HEADS, D, BD, GATE, WIDE, BM,
    )  # fmt: skip
    if GATE != GATE_NONE:
        dk, dv, du = _query_tiles(
            dk, dv, du, k, v, u, born, until, sat_end, gated, masked, 0, 0, q_ptr, do_ptr, lse_ptr, delta_ptr,
            tau_ptr, sq_n, sq_h, sdo_n, sdo_h, N, scale, GATED, G, HEADS, D, BD, GATE, WIDE, BM,
        )  # fmt: skip
    dk, dv, du = _query_tiles(
        dk, dv, du, k, v, u, born, until, sat_end, begin, clear, masked, end, q_ptr, do_ptr, lse_ptr, delta_ptr,
        tau_ptr, sq_n, sq_h, sdo_n, sdo_h, N, scale, MASKED, G, HEADS, D, BD, GATE, WIDE, BM,
    )  # fmt: skip
    return dk, dv, du


@triton.jit(do_not_specialize=["N", "window", "segments", "KV_HEADS"])
def dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, tau_ptr, list_ptr, u_ptr, expiry_ptr, sat_end_ptr, bounds_ptr,
    dk_ptr, dv_ptr, du_ptr, sdo_b, sdo_h, sdo_n, sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    N, window, scale, segments, CAP, KV_HEADS, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    GATE: tl.constexpr, WIDE: tl.constexpr, SEGMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Partials of BN entries of one segment's list: rows (slot * CAP + entry) of dk, dv [.., D] and du, all float32."""
    BQ: tl.constexpr = BM // HEADS
    segment = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    slot = row * segments + segment
    entry = tl.program_id(0) * BN + tl.arange(0, BN)
    length = tl.load(bounds_ptr + slot * 5 + 4)
    if tl.program_id(0) * BN < length:
        batch = row // KV_HEADS
        head = row % KV_HEADS
        every = entry < length
        # Past the end the last entry again, so that a tile's bounds stay those of its keys; it is not stored twice.
        source = slot * CAP + tl.minimum(entry, length - 1)
        j = tl.load(list_ptr + source)
        k = load_rows(k_ptr + batch * sk_b + head * sk_h, j, sk_n, entry >= 0, D, BD, WIDE)
        v = load_rows(v_ptr + batch * sv_b + head * sv_h, j, sv_n, entry >= 0, D, BD, WIDE)
        u = tl.load(u_ptr + source)
        until = tl.load(expiry_ptr + source)
        sat_end = tl.load(sat_end_ptr + source)
        born = j + window
        begin = segment * SEGMENT
        end = tl.minimum(tl.minimum(begin + SEGMENT, N), tl.max(until, 0))
        begin += tl.maximum(tl.min(born, 0) - begin, 0) // BQ * BQ
        dk, dv, du = _key_tile(
            k, v, u, born, until, sat_end, begin, end, q_ptr + batch * sq_b + head * G * sq_h,
            do_ptr + batch * sdo_b + head * G * sdo_h, lse_ptr + row * G * N, delta_ptr + row * G * N,
            tau_ptr + row * N, sq_n, sq_h, sdo_n, sdo_h, N, scale, G, HEADS, D, BD, GATE, WIDE, BM, BN,
        )  # fmt: skip
        at = slot * CAP + entry
        store_rows(dk_ptr, at, D, every, dk * scale, D, BD, True)
        store_rows(dv_ptr, at, D, every, dv, D, BD, True)
        if GATE != GATE_NONE:
            tl.store(du_ptr + at, du, mask=every)


@triton.jit(do_not_specialize=["N", "window", "KV_HEADS"])
def band_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, expiry_ptr, dk_band_ptr, dv_band_ptr, dk_ptr, dv_ptr,
    sdo_b, sdo_h, sdo_n, sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, sdk_b, sdk_h, sdk_n, sdv_b, sdv_h, sdv_n,
    N, window, scale, KV_HEADS, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The window's part of dk and dv: key j counts for queries [j, j + window), ungated.

    Of keys that some query selects it goes to dk_band and dv_band [rows, N, D], float32, for ``reduce_kernel`` to add;
    of all others it is the result.
    """
    row = tl.program_id(1).to(tl.int64)
    batch = row // KV_HEADS
    head = row % KV_HEADS
    begin = tl.program_id(0) * BN
    at = begin + tl.arange(0, BN)
    every = at < N
    j = tl.minimum(at, N - 1)
    k = load_rows(k_ptr + batch * sk_b + head * sk_h, j, sk_n, at >= 0, D, BD, WIDE)
    v = load_rows(v_ptr + batch * sv_b + head * sv_h, j, sv_n, at >= 0, D, BD, WIDE)
    dk, dv, _ = _key_tile(
        k, v, j, j, j + window, j, begin, tl.minimum(N, begin + BN - 1 + window),
        q_ptr + batch * sq_b + head * G * sq_h, do_ptr + batch * sdo_b + head * G * sdo_h, lse_ptr + row * G * N,
        delta_ptr + row * G * N, lse_ptr, sq_n, sq_h, sdo_n, sdo_h, N, scale, G, HEADS, D, BD, GATE_NONE, WIDE, BM, BN,
    )  # fmt: skip
    selected = every & (tl.load(expiry_ptr + row * N + at, mask=every, other=0) > at + window)
    store_rows(dk_band_ptr, row * N + at, D, selected, dk * scale, D, BD, True)
    store_rows(dv_band_ptr, row * N + at, D, selected, dv, D, BD, True)
    store_rows(dk_ptr + batch * sdk_b + head * sdk_h, at, sdk_n, every & ~selected, dk * scale, D, BD, WIDE)
    store_rows(dv_ptr + batch * sdv_b + head * sdv_h, at, sdv_n, every & ~selected, dv, D, BD, WIDE)


@triton.jit(do_not_specialize=["N", "chunks"])
def prefix_kernel(x_ptr, sum_ptr, offset_ptr, N, chunks, BLOCK: tl.constexpr):
    """Exclusive prefix sums within each chunk of BLOCK of every row of x [rows, N], in float64: sum [rows, N + 1], and
    the chunks' sums: offset [rows, chunks]."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + at, mask=at < N, other=0.0).to(tl.float64)
    tl.store(sum_ptr + row * (N + 1) + at, tl.cumsum(x, 0) - x, mask=at <= N)
    tl.store(offset_ptr + row * chunks + tl.program_id(0), tl.sum(x, 0))


@triton.jit(do_not_specialize=["chunks"])
def offsets_kernel(offset_ptr, chunks, BLOCK: tl.constexpr):
    """Exclusive prefix sums of each row of offset [rows, chunks], in place."""
    offset_ptr += tl.program_id(0).to(tl.int64) * chunks
    carry = tl.full([], 0.0, tl.float64)
    for i in range(0, chunks, BLOCK):
        at = i + tl.arange(0, BLOCK)
        x = tl.load(offset_ptr + at, mask=at < chunks, other=0.0)
        tl.store(offset_ptr + at, carry + tl.cumsum(x, 0) - x, mask=at < chunks)
        carry += tl.sum(x, 0)


@triton.jit
def _prefix(sum_ptr, offset_ptr, at, mask, BLOCK: tl.constexpr):
    local = tl.load(sum_ptr + at, mask=mask, other=0.0)
    return local + tl.load(offset_ptr + at // BLOCK, mask=mask, other=0.0)


@triton.jit
def _find(list_ptr, lo, hi, j, todo, STEPS: tl.constexpr):
    """Where each j stands in the ascending entries [lo, hi) of its list, PROBES ** STEPS at most. Each step waits for
    memory once, whatever the number of its probes."""
    probe = tl.arange(0, PROBES)[None, :]
    for _ in tl.static_range(STEPS):
        stride = (hi - lo + PROBES - 1) // PROBES
        at = lo[:, None] + (probe + 1) * stride[:, None] - 1
        inside = todo[:, None] & (at >= lo[:, None]) & (at < hi[:, None])
        less = inside & (tl.load(list_ptr[:, None] + at, mask=inside, other=0) < j[:, None])
        lo += tl.sum(less.to(tl.int32), 1) * stride
        hi = tl.minimum(lo + stride, hi)
    return lo


@triton.jit
def _parts(
    dk, dv, dk_part_ptr, dv_part_ptr, du_part_ptr, j, expiry, sat_end, list_ptr, bounds_ptr, start_ptr, stop_ptr,
    late_stop_ptr, row, N, window, segments, CAP, D: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr,
    SEGMENT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Add the partials of selected key j to dk and dv [1, BD], by segment; returns du's sum, too. A lane looks for the
    key's entry in one of AHEAD segments: all wait for memory at the same time."""
    lane = tl.arange(0, AHEAD)
    du = tl.zeros([AHEAD], tl.float32)
    born = j + window
    first = born // SEGMENT
    final = (expiry - 1) // SEGMENT
    late = expiry < tl.minimum((first + 1) * SEGMENT, N)  # dropped in the segment of its birth
    in_first = tl.load(tl.where(late, late_stop_ptr, stop_ptr) + row * N + born) - 1
    in_final = tl.load(start_ptr + row * N + expiry, mask=expiry < N, other=1) - 1
    for done in range(first, final + 1, AHEAD):
        segment = done + lane
        here = segment <= final
        slot = row * segments + segment
        end = tl.minimum((segment + 1) * SEGMENT, N)
        whole = sat_end >= end
        stays = here & (first < segment) & (expiry >= end)
        dying_end = tl.load(bounds_ptr + slot * 5, mask=stays, other=0)
        free = tl.load(bounds_ptr + slot * 5 + 1, mask=stays, other=0)
        free_end = tl.load(bounds_ptr + slot * 5 + 2, mask=stays, other=0)
        entry = _find(
            list_ptr + slot * CAP, tl.where(whole, free, dying_end), tl.where(whole, free_end, free), j, stays, STEPS
        )  # fmt: skip
        entry = tl.where(stays, entry, tl.where(first == segment, in_first, in_final))
        at = tl.where(here, slot * CAP + entry, -1)
        if GATE != GATE_NONE:
            du += tl.load(du_part_ptr + at, mask=here, other=0.0)
        for a in tl.static_range(AHEAD):
            source = tl.max(tl.where(lane == a, at, -1), 0) + tl.arange(0, 1)
            dk += load_rows(dk_part_ptr, source, D, source >= 0, D, BD, True)
            dv += load_rows(dv_part_ptr, source, D, source >= 0, D, BD, True)
    return dk, dv, tl.sum(du, 0)


@triton.jit(do_not_specialize=["N", "M", "window", "segments", "chunks", "KV_HEADS"])
def reduce_kernel(
    dk_part_ptr, dv_part_ptr, du_part_ptr, dk_band_ptr, dv_band_ptr, prefix_ptr, offset_ptr, expiry_ptr, sat_end_ptr,
    sup_end_ptr, list_ptr, bounds_ptr, start_ptr, stop_ptr, late_stop_ptr, dk_ptr, dv_ptr, du_ptr,
    sdk_b, sdk_h, sdk_n, sdv_b, sdv_h, sdv_n,
    N, M, window, segments, chunks, CAP, KV_HEADS, D: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr,
    SELECTED: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr, SEGMENT: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """du of BLOCK keys, and dk and dv: with a window of those that queries select, ``band_kernel`` wrote the others.

    Keys that no query selects, in general nearly all, are done with together, the others one by one."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    j = tl.program_id(0) * BLOCK + at
    inside = j < N
    du = tl.zeros([BLOCK], tl.float32)
    sat_end = tl.load(sat_end_ptr + row * N + j, mask=inside, other=0)
    if SELECTED:
        dk_ptr += row // KV_HEADS * sdk_b + row % KV_HEADS * sdk_h
        dv_ptr += row // KV_HEADS * sdv_b + row % KV_HEADS * sdv_h
        expiry = tl.load(expiry_ptr + row * N + j, mask=inside, other=0)
        chosen = (j < M) & (expiry > j + window)
        if not WINDOW:
            zero = tl.zeros([BLOCK, BD], tl.float32)
            store_rows(dk_ptr, j, sdk_n, inside & ~chosen, zero, D, BD, WIDE)
            store_rows(dv_ptr, j, sdv_n, inside & ~chosen, zero, D, BD, WIDE)
        left = tl.where(chosen, at, BLOCK)
        next_ = tl.min(left, 0)
        while next_ < BLOCK:
            here = at == next_
            key = tl.program_id(0) * BLOCK + next_
            own = key + tl.arange(0, 1)
            dk = tl.zeros([1, BD], tl.float32)
            dv = tl.zeros([1, BD], tl.float32)
            if WINDOW:
                dk = load_rows(dk_band_ptr, row * N + own, D, own >= 0, D, BD, True)
                dv = load_rows(dv_band_ptr, row * N + own, D, own >= 0, D, BD, True)
            dk, dv, direct = _parts(
                dk, dv, dk_part_ptr, dv_part_ptr, du_part_ptr, key, tl.sum(tl.where(here, expiry, 0), 0),
                tl.sum(tl.where(here, sat_end, 0), 0), list_ptr, bounds_ptr, start_ptr, stop_ptr, late_stop_ptr, row, N,
                window, segments, CAP, D, BD, GATE, SEGMENT, STEPS,
            )  # fmt: skip
            du = tl.where(here, direct, du)
            store_rows(dk_ptr, own, sdk_n, own >= 0, dk, D, BD, WIDE)
            store_rows(dv_ptr, own, sdv_n, own >= 0, dv, D, BD, WIDE)
            left = tl.where(here, BLOCK, left)
            next_ = tl.min(left, 0)
    if SELECTED and GATE != GATE_NONE:
        sup_end = tl.load(sup_end_ptr + row * N + j, mask=inside, other=0)
        spread = inside & (j < M) & (sup_end > sat_end)
        prefix_ptr += row * (N + 1)
        offset_ptr += row * chunks
        taken = _prefix(prefix_ptr, offset_ptr, sup_end, spread, PREFIX)
        taken -= _prefix(prefix_ptr, offset_ptr, sat_end, spread, PREFIX)
        du = (du.to(tl.float64) - taken).to(tl.float32)
    tl.store(du_ptr + row * N + j, du, mask=inside)


def _default(problem, device):
    # About one program in four has a selected key, of scores without a trend: the t-th is one with a probability of
    # k / t. Several selected ones follow one another.
    share = problem.n / problem.k
    block = max(1, min(64, int(share / (1 + math.log(share)) / 4))) if share > 1 else 1
    return Config(default_tile(problem, 32, 64, 3), BLOCK=1 << (block.bit_length() - 1), reduce_warps=1)


def _check(config, problem, device):
    if config["BM"] * config["BN"] > 64 * 128:
        return "tile too large: two accumulators and two products do not fit the register file"
    return tile_error(config, problem, device, 2, 2)


def _cost(config, problem):
    rows = pairs(problem) * problem.rows * next_pow2(problem.g)
    slow, gathered = mma_cost(problem, 2 * rows, config["BN"], config["BN"])
    token = problem.rows * problem.n * problem.d * (2 * problem.g + 4) * DTYPE_BYTES[problem.dtype]
    partials = problem.rows * problem.n * problem.d * 8.0 * (1 + min(problem.k, problem.n) / 1024)
    return Cost(flops=8.0 * problem.d * rows * slow, bytes=token + gathered + 2 * partials, launches=3)


def search_steps(entries: int) -> int:
    """Of a search among that many."""
    steps = 0
    while PROBES.value**steps < entries:
        steps += 1
    return steps


TEMPLATE = Template(
    name="dkv",
    fields=frozenset({"dtype", "d", "g", "gate", "k", "w", "n", "rows"}),
    space=(
        Param("BM", Pow2(16, 128)),
        Param("BN", Pow2(16, 128)),
        Param("num_warps", Choice((4, 8))),
        Param("num_stages", Choice((1, 2, 3))),
        Param("registers", Choice((255, 168, 128))),
        Param("BLOCK", Pow2(1, 64)),  # keys of a program of the reduction
        Param("reduce_warps", Choice((1, 2, 4))),
    ),
    default=_default,
    check=_check,
    cost=_cost,
    sources=(__file__, tiles_file),
)
