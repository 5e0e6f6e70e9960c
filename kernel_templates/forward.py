"""Forward: one softmax over the window and the selected keys, gates on the fly.

Per tile of queries four loops: keys that every query sees ungated (saturated ones of the list, the inside of the
window); keys of the list that every query selects, gated; the rest of the list, gated and masked by the interval of
queries that see the key; the window's edges, masked. Softmax in base 2, relative to the largest logit of a few keys;
online (Milakov and Gimelshein 2018; FlashAttention-2) in float16, and where that leaves the safe range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .base import DTYPE_BYTES, Choice, Config, Cost, Param, Pow2, Template, next_pow2
from .tiles import (
    GATE_KV,
    GATE_NONE,
    LOG2E,
    bound,
    default_tile,
    distance,
    edge_block,
    edge_bound,
    edge_steps,
    gate,
    gated_entries,
    interval,
    list_runs,
    load_rows,
    masked_columns,
    masked_keys,
    masked_steps,
    mma_cost,
    plain_keys,
    store_rows,
    tile_error,
    window_runs,
)
from .tiles import __file__ as tiles_file

ABOVE = tl.constexpr(100.0)  # the largest logit of some keys is what is subtracted from all, in base 2
SMALL = tl.constexpr(2.0**-102)  # a softmax sum below may have lost weights that count: it is done again
LARGE = tl.constexpr(2.0**126)  # likewise where it or a sum of values is above
COLUMNS = tl.constexpr(8)  # of ones: the fewest of a product of the tensor cores


@triton.jit
def _columns(total, ONES: tl.constexpr):
    """Sums of the loops over ungated keys: with ONES by products with ones, for which the tensor cores have time."""
    return tl.zeros([total.shape[0], COLUMNS], tl.float32) if ONES else total


@triton.jit
def _add_columns(total, sums):
    return total + tl.max(sums, 1) if len(sums.shape) == 2 else sums


@triton.jit
def _accumulate(acc, peak, total, x, most, g, v, MASKED: tl.constexpr, GATED: tl.constexpr, ONLINE: tl.constexpr):
    """Add exp2(x - peak) of the logits x (base 2), gated by g, to the sums; ONLINE raises peak to the largest.

    Ungated weights are summed as rounded to v's dtype: where one key has most of the weight its rounding cancels. With
    ONLINE it has none, as its weight is 1, so they are summed as they are. So is a gated weight: it is rounded after
    its gate, so nothing would cancel, and in the backward pass a query's only key has a weight of 1, as du, a
    difference, needs.
    """
    if ONLINE:
        if MASKED:
            x = tl.minimum(x, most)
        new_peak = tl.maximum(peak, tl.max(x, 1))
        shrink = tl.exp2(peak - new_peak)
        acc = acc * shrink[:, None]
        total = total * shrink
        peak = new_peak
    x -= peak[:, None]
    if MASKED and not ONLINE:
        x = tl.minimum(x, most)
    p = tl.exp2(x)
    rounded = (p * g if GATED else p).to(v.dtype)
    if len(total.shape) == 2:
        total = tl.dot(rounded, tl.full([p.shape[1], COLUMNS], 1.0, v.dtype), total)
    elif GATED or ONLINE:
        total += tl.sum(p, 1)
    else:
        total += tl.sum(rounded.to(tl.float32), 1)
    acc = tl.dot(rounded, v, acc, input_precision="ieee")
    return acc, peak, total


@triton.jit
def _reference(
    q, i, k_ptr, sk_n, list_ptr, runs, first, last, window, log_scale, BQ: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr, SELECTED: tl.constexpr, WINDOW: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What is subtracted from the logits of each row's query i. Softmax does not care, as long as nothing leaves the
    range of float32 (and bfloat16): the largest logit of a few keys will do, and spares the running maximum. They are
    from all over the part of the list that every query sees, every other one from the window's last, close enough to
    each other that one is near any key just before a query: a row looks at those that it sees, so no sum is below
    2^-ABOVE, and the reference is as high as that allows. Where there is no such part they are all the window's, or
    the list's first; where not every query sees one, sums may be anywhere, and the reference stays in the middle."""
    n = tl.arange(0, BN)
    oldest = tl.maximum(last - window + 1, 0)
    seen = oldest <= first
    STRIDE: tl.constexpr = BQ // (BN // 2) + 1
    # One that the first query sees is always there.
    j = tl.maximum(tl.where(n == BN - 1, tl.minimum(last - n * STRIDE // 2, first), last - n * STRIDE // 2), oldest)
    j = tl.minimum(j, last)
    by_list = n < 0
    most = tl.full([BN], float("inf"), tl.float32)
    if SELECTED:
        lo, clear, plain, end, born, hi = runs
        if not WINDOW:
            seen = born > clear
        entry = tl.where(born > clear, clear + n * (born - clear) // BN, lo + n)
        by_list = entry < hi
        if WINDOW:
            by_list = by_list & (born > clear) & (n % 2 == 0)
        j = tl.where(by_list, tl.load(list_ptr + entry, mask=by_list, other=0), j)
        if GATE == GATE_KV:  # a gate leaves of a logit what is between 0 and all of it
            most = tl.where(by_list & ((entry < plain) | (entry >= end)), 0.0, most)
    k = load_rows(k_ptr, j, sk_n, n < BN, D, BD, WIDE)
    x = tl.minimum(tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale, most[None, :])
    if WINDOW:
        x = tl.where((by_list | (seen == 0))[None, :] | (j[None, :] <= i[:, None]), x, float("-inf"))
    return tl.max(x, 1) + tl.where(seen, ABOVE, 0.0)


@triton.jit
def _masked(
    acc, peak, total, q, near, tau, k_ptr, v_ptr, sk_n, sv_n, list_ptr, list_u_ptr, list_expiry_ptr, runs, first,
    window, log_scale, D: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
    ONLINE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the masked runs of a list to the sums. near: the distances of the rows' queries from ``first``."""
    n = tl.arange(0, BN)
    j = masked_keys(list_ptr, 0, runs, BN)
    for step in tl.range(0, masked_steps(runs, BN), num_stages=STAGES):
        next_j = masked_keys(list_ptr, step + 1, runs, BN)
        u, begin, until = masked_columns(list_ptr, list_u_ptr, list_expiry_ptr, step, runs, window, BN)
        k = load_rows(k_ptr, j, sk_n, n < BN, D, BD, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        g = gate(u[None, :], tau[:, None])
        if GATE == GATE_KV:
            s = s * g
        middle, half = interval(begin, until, first)
        most = bound(near[:, None], middle[None, :], half[None, :])
        v = load_rows(v_ptr, j, sv_n, n < BN, D, BD, WIDE)
        acc, peak, total = _accumulate(acc, peak, total, s * log_scale, most, g, v, True, GATE != GATE_NONE, ONLINE)
        j = next_j
    return acc, peak, total


@triton.jit
def _edges(
    acc, peak, total, q, near, k_ptr, v_ptr, sk_n, sv_n, lo, clear, end, first, last, window, log_scale,
    D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, ONLINE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the window keys that not all of the tile's queries see."""
    sums = _columns(total, v_ptr.dtype.element_ty == tl.bfloat16 and not ONLINE)
    for step in tl.range(0, edge_steps(lo, clear, end, last, BN), num_stages=STAGES):
        block = edge_block(step, lo, clear, end, BN)
        j = block + tl.arange(0, BN)
        k = load_rows(k_ptr, j, sk_n, j <= last, D, BD, WIDE)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale
        most = edge_bound(near, block, window, first, BN)
        v = load_rows(v_ptr, j, sv_n, j <= last, D, BD, WIDE)
        acc, peak, sums = _accumulate(acc, peak, sums, x, most, x, v, True, False, ONLINE)
    return acc, peak, _add_columns(total, sums)


@triton.jit(do_not_specialize=["N", "window", "segments", "KV_HEADS"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, tau_ptr, list_ptr, list_u_ptr, list_expiry_ptr, bounds_ptr, start_ptr, stop_ptr,
    late_stop_ptr, o_ptr, lse_ptr, sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, so_b, so_h, so_n,
    N, window, scale, segments, CAP, KV_HEADS, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    GATE: tl.constexpr, SELECTED: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr, SEGMENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BQ: tl.constexpr = BM // HEADS
    row = tl.program_id(1).to(tl.int64)
    batch = row // KV_HEADS
    head = row % KV_HEADS
    first = tl.program_id(0) * BQ
    last = tl.minimum(first + BQ, N) - 1
    m = tl.arange(0, BM)
    i = first + m // HEADS
    h = m % HEADS
    ok = (i < N) & (h < G)
    q_ptr += batch * sq_b + head * G * sq_h
    k_ptr += batch * sk_b + head * sk_h
    v_ptr += batch * sv_b + head * sv_h
    at_row = i * sq_n + h * sq_h
    if WIDE:
        at_row = i.to(tl.int64) * sq_n + h.to(tl.int64) * sq_h
    q = load_rows(q_ptr, at_row, 1, ok, D, BD, WIDE)
    log_scale = scale * LOG2E
    n = tl.arange(0, BN)
    ONLINE: tl.constexpr = q.dtype == tl.float16
    # Masks take registers; a narrow block leaves them.
    NARROW: tl.constexpr = BN // 2 if BN > 16 else BN

    lo, clear, plain, end, born, hi, late, late_hi = first, first, first, first, first, first, first, first
    if SELECTED:
        slot = row * segments + first // SEGMENT
        list_ptr += slot * CAP
        list_u_ptr += slot * CAP
        list_expiry_ptr += slot * CAP
        lo, clear, plain, end, born, hi, late, late_hi = list_runs(
            bounds_ptr, start_ptr + row * N, stop_ptr + row * N, late_stop_ptr + row * N, slot, first, last, BN,
            GATE != GATE_NONE,
        )  # fmt: skip
    runs = lo, clear, born, hi, late, late_hi
    window_lo, window_clear, window_end = last + 1, last + 1, last + 1
    if WINDOW:
        window_lo, window_clear, window_end = window_runs(first, last, window, BN)

    near = distance(i, first)
    peak = tl.full([BM], float("-inf"), tl.float32)
    if not ONLINE:
        peak = _reference(
            q, i, k_ptr, sk_n, list_ptr, (lo, clear, plain, end, born, hi), first, last, window, log_scale, BQ, D, BD,
            GATE, WIDE, SELECTED, WINDOW, BN,
        )  # fmt: skip

    tau = tl.load(tau_ptr + row * N + i, mask=i < N, other=float("-inf"))
    acc = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)

    # The next block's indices are loaded one step early, so that the gathers do not wait for them.
    sums = _columns(total, q.dtype == tl.bfloat16)
    listed = (end - plain) // BN
    j = plain_keys(list_ptr, 0, plain, listed, window_clear, SELECTED, WINDOW, BN)
    for step in range(0, listed + (window_end - window_clear) // BN if WINDOW else listed):
        next_j = plain_keys(list_ptr, step + 1, plain, listed, window_clear, SELECTED, WINDOW, BN)
        k = load_rows(k_ptr, j, sk_n, n < BN, D, BD, WIDE)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale
        v = load_rows(v_ptr, j, sv_n, n < BN, D, BD, WIDE)
        acc, peak, sums = _accumulate(acc, peak, sums, x, x, x, v, False, False, ONLINE)
        j = next_j
    total = _add_columns(total, sums)

    if SELECTED and GATE != GATE_NONE:
        j = tl.load(list_ptr + gated_entries(0, clear, plain, end, BN))
        for step in range(0, (plain - clear + born - end) // BN):
            ahead = gated_entries(step + 1, clear, plain, end, BN)
            next_j = tl.load(list_ptr + ahead, mask=ahead < CAP, other=0)
            k = load_rows(k_ptr, j, sk_n, n < BN, D, BD, WIDE)
            u = tl.load(list_u_ptr + gated_entries(step, clear, plain, end, BN))
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            g = gate(u[None, :], tau[:, None])
            if GATE == GATE_KV:
                s = s * g
            v = load_rows(v_ptr, j, sv_n, n < BN, D, BD, WIDE)
            acc, peak, total = _accumulate(acc, peak, total, s * log_scale, s, g, v, False, True, ONLINE)
            j = next_j

    if SELECTED:
        acc, peak, total = _masked(
            acc, peak, total, q, near, tau, k_ptr, v_ptr, sk_n, sv_n, list_ptr, list_u_ptr, list_expiry_ptr,
            runs, first, window, log_scale, D, BD, GATE, WIDE, NARROW, ONLINE, STAGES,
        )  # fmt: skip
    if WINDOW:
        acc, peak, total = _edges(
            acc, peak, total, q, near, k_ptr, v_ptr, sk_n, sv_n, window_lo, window_clear, window_end, first, last,
            window, log_scale, D, BD, WIDE, BN, ONLINE, STAGES,
        )  # fmt: skip
    if not ONLINE:
        # Not for the first tile: where one key is all there is, its weight has to be 1, which bfloat16 holds exactly.
        # Any other is rounded, and that would show in delta, and from there in dq, which is zero.
        good = (total >= SMALL) & (tl.maximum(total, tl.max(tl.abs(acc), 1)) <= LARGE) & (i >= BQ)
        if tl.min((good | (ok == 0)).to(tl.int32), 0) == 0:
            acc = tl.zeros([BM, BD], tl.float32)
            total = tl.zeros([BM], tl.float32)
            peak = tl.full([BM], float("-inf"), tl.float32)
            if SELECTED:
                acc, peak, total = _masked(
                    acc, peak, total, q, near, tau, k_ptr, v_ptr, sk_n, sv_n, list_ptr, list_u_ptr,
                    list_expiry_ptr, (lo, hi, hi, hi, late, late_hi), first, window, log_scale, D, BD, GATE, WIDE,
                    NARROW, True, 1,
                )  # fmt: skip
            if WINDOW:
                acc, peak, total = _edges(
                    acc, peak, total, q, near, k_ptr, v_ptr, sk_n, sv_n, window_lo, window_end, window_end,
                    first, last, window, log_scale, D, BD, WIDE, NARROW, True, 1,
                )  # fmt: skip

    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    at_out = i * so_n + h * so_h
    if WIDE:
        at_out = i.to(tl.int64) * so_n + h.to(tl.int64) * so_h
    store_rows(o_ptr + batch * so_b + head * G * so_h, at_out, 1, ok, o, D, BD, WIDE)
    lse = (peak + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + (row * G + h) * N + i, lse, mask=ok)


def pairs(problem) -> float:
    """Selected and window pairs of one KV row: sum_i |S_i| + |N_i| (upper bound)."""
    reach = min(problem.k + problem.w, problem.n)
    return reach * (problem.n - reach / 2)


def _default(problem, device):
    return Config(default_tile(problem, 128, 32, 3))


def _check(config, problem, device):
    return tile_error(config, problem, device, 1, 2)


def _cost(config, problem):
    rows = pairs(problem) * problem.rows * next_pow2(problem.g)
    waste = 1 + config["BM"] / next_pow2(problem.g) / max(problem.k, 1)
    slow, gathered = mma_cost(problem, 2 * rows * waste, config["BM"], config["BM"])
    token = problem.rows * problem.n * problem.d * (2 * problem.g + 2) * DTYPE_BYTES[problem.dtype]
    return Cost(flops=4.0 * problem.d * rows * waste * slow, bytes=token + gathered)


TEMPLATE = Template(
    name="forward",
    fields=frozenset({"dtype", "d", "g", "gate", "k", "w", "n", "rows"}),
    space=(
        Param("BM", Pow2(16, 256)),
        Param("BN", Pow2(16, 128)),
        Param("num_warps", Choice((4, 8))),
        Param("num_stages", Choice((1, 2, 3, 4))),
        Param("registers", Choice((255, 168, 128))),
    ),
    default=_default,
    check=_check,
    cost=_cost,
    sources=(__file__, tiles_file),
)
