"""Backward with respect to the query, and the mean score gradient gbar of every query.

The same tiles, list and loops as the forward pass. With a the softmax weight of an ungated key, do . v the
product with the output gradient and delta = do . o (research summary in ARCHITECTURE.md, "Gradients"):
gate kv: ds = a (m do.v - delta), g = a do.v + scale ds q.k, dq += scale m ds k; gate v: without the m and the second
term. gbar_i = (sum over heads and keys of I_i that are selected of g_ij) / |I_i|.
"""

from __future__ import annotations

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
    edge_block,
    edge_bound,
    edge_steps,
    gate,
    gated_entries,
    gated_grads,
    interval,
    list_runs,
    load_rows,
    masked_columns,
    masked_entries,
    masked_keys,
    masked_steps,
    mma_cost,
    plain_keys,
    store_rows,
    tile_error,
    window_runs,
)
from .tiles import __file__ as tiles_file


@triton.jit(do_not_specialize=["N", "window", "segments", "KV_HEADS"])
def dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, tau_ptr, interior_ptr, list_ptr, list_u_ptr, list_expiry_ptr,
    list_sat_end_ptr, bounds_ptr, start_ptr, stop_ptr, late_stop_ptr, dq_ptr, delta_ptr, gbar_ptr,
    sdo_b, sdo_h, sdo_n, sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, so_b, so_h, so_n, sdq_b, sdq_h, sdq_n,
    N, window, scale, segments, CAP, KV_HEADS, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    GATE: tl.constexpr, SELECTED: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr, SEGMENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
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
    token = i
    sub = h  # the head among those of the KV head, as wide as the strides need
    if WIDE:
        token = i.to(tl.int64)
        sub = h.to(tl.int64)
    k_ptr += batch * sk_b + head * sk_h
    v_ptr += batch * sv_b + head * sv_h
    q = load_rows(q_ptr + batch * sq_b + head * G * sq_h, token * sq_n + sub * sq_h, 1, ok, D, BD, WIDE)
    do = load_rows(do_ptr + batch * sdo_b + head * G * sdo_h, token * sdo_n + sub * sdo_h, 1, ok, D, BD, WIDE)
    o = load_rows(o_ptr + batch * so_b + head * G * so_h, token * so_n + sub * so_h, 1, ok, D, BD, WIDE)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + (row * G + h) * N + i, delta, mask=ok)
    lse = tl.load(lse_ptr + (row * G + h) * N + i, mask=ok, other=0.0) * LOG2E
    acc = tl.zeros([BM, BD], tl.float32)
    g_sum = tl.zeros([BM], tl.float32)
    log_scale = scale * LOG2E
    n = tl.arange(0, BN)
    tau = tl.load(tau_ptr + row * N + i, mask=i < N, other=float("-inf"))
    lo, clear, plain, end, born, hi, late, late_hi = first, first, first, first, first, first, first, first
    if SELECTED:
        slot = row * segments + first // SEGMENT
        list_ptr += slot * CAP
        list_u_ptr += slot * CAP
        list_expiry_ptr += slot * CAP
        list_sat_end_ptr += slot * CAP
        lo, clear, plain, end, born, hi, late, late_hi = list_runs(
            bounds_ptr, start_ptr + row * N, stop_ptr + row * N, late_stop_ptr + row * N, slot, first, last, BN,
            GATE != GATE_NONE,
        )  # fmt: skip
    window_lo, window_clear, window_end = last + 1, last + 1, last + 1
    if WINDOW:
        window_lo, window_clear, window_end = window_runs(first, last, window, BN)
    runs = lo, clear, born, hi, late, late_hi

    listed = (end - plain) // BN
    j = plain_keys(list_ptr, 0, plain, listed, window_clear, SELECTED, WINDOW, BN)
    for step in range(0, listed + (window_end - window_clear) // BN if WINDOW else listed):
        next_j = plain_keys(list_ptr, step + 1, plain, listed, window_clear, SELECTED, WINDOW, BN)
        k = load_rows(k_ptr, j, sk_n, n < BN, D, BD, WIDE)
        v = load_rows(v_ptr, j, sv_n, n < BN, D, BD, WIDE)
        a = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale - lse[:, None])
        ds = a * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
        j = next_j

    if SELECTED and GATE != GATE_NONE:
        j = tl.load(list_ptr + gated_entries(0, clear, plain, end, BN))
        for step in range(0, (plain - clear + born - end) // BN):
            ahead = gated_entries(step + 1, clear, plain, end, BN)
            next_j = tl.load(list_ptr + ahead, mask=ahead < CAP, other=0)
            k = load_rows(k_ptr, j, sk_n, n < BN, D, BD, WIDE)
            v = load_rows(v_ptr, j, sv_n, n < BN, D, BD, WIDE)
            entry = gated_entries(step, clear, plain, end, BN)
            u = tl.load(list_u_ptr + entry)
            sat_end = tl.load(list_sat_end_ptr + entry)
            g = gate(u[None, :], tau[:, None])
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            logit = s * log_scale
            if GATE == GATE_KV:
                logit = logit * g
            ds, dm = gated_grads(tl.exp2(logit - lse[:, None]), g, s, dp, delta[:, None], scale, GATE)
            g_sum += tl.sum(tl.where(i[:, None] >= sat_end[None, :], dm, 0.0), 1)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
            j = next_j

    near = distance(i, first)
    if SELECTED:
        j = masked_keys(list_ptr, 0, runs, BN)
        for step in range(0, masked_steps(runs, BN)):
            next_j = masked_keys(list_ptr, step + 1, runs, BN)
            u, begin, until = masked_columns(list_ptr, list_u_ptr, list_expiry_ptr, step, runs, window, BN)
            k = load_rows(k_ptr, j, sk_n, n < BN, D, BD, WIDE)
            v = load_rows(v_ptr, j, sv_n, n < BN, D, BD, WIDE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            g = gate(u[None, :], tau[:, None])
            logit = s * log_scale
            if GATE == GATE_KV:
                logit = logit * g
            middle, half = interval(begin, until, first)
            a = tl.exp2(tl.minimum(logit - lse[:, None], bound(near[:, None], middle[None, :], half[None, :])))
            if GATE == GATE_NONE:
                ds = a * (dp - delta[:, None])
            else:
                entry, inside = masked_entries(step, runs, BN)
                sat_end = tl.load(list_sat_end_ptr + entry, mask=inside, other=0)
                ds, dm = gated_grads(a, g, s, dp, delta[:, None], scale, GATE)
                g_sum += tl.sum(tl.where(i[:, None] >= sat_end[None, :], dm, 0.0), 1)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
            j = next_j

    if WINDOW:
        for step in range(0, edge_steps(window_lo, window_clear, window_end, last, BN)):
            block = edge_block(step, window_lo, window_clear, window_end, BN)
            j = block + n
            k = load_rows(k_ptr, j, sk_n, j <= last, D, BD, WIDE)
            v = load_rows(v_ptr, j, sv_n, j <= last, D, BD, WIDE)
            logit = tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale - lse[:, None]
            a = tl.exp2(tl.minimum(logit, edge_bound(near, block, window, first, BN)))
            ds = a * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")

    dq_ptr += batch * sdq_b + head * G * sdq_h
    store_rows(dq_ptr, token * sdq_n + sub * sdq_h, 1, ok, acc * scale, D, BD, WIDE)
    if GATE != GATE_NONE:
        query = first + tl.arange(0, BQ)
        interior = tl.load(interior_ptr + row * N + query, mask=query < N, other=1)
        # Rows of missing heads read q = do = 0, so they add nothing.
        total = tl.sum(tl.reshape(tl.where(ok, g_sum, 0.0), [BQ, HEADS]), 1)
        gbar = tl.where(interior > 0, total / tl.maximum(interior, 1).to(tl.float32), 0.0)
        tl.store(gbar_ptr + row * N + query, gbar, mask=query < N)


def _default(problem, device):
    return Config(default_tile(problem, 64, 32, 2))


def _check(config, problem, device):
    return tile_error(config, problem, device, 2, 2)


def _cost(config, problem):
    rows = pairs(problem) * problem.rows * next_pow2(problem.g)
    waste = 1 + config["BM"] / next_pow2(problem.g) / max(problem.k, 1)
    slow, gathered = mma_cost(problem, 2 * rows * waste, config["BM"], config["BM"])
    token = problem.rows * problem.n * problem.d * (4 * problem.g + 2) * DTYPE_BYTES[problem.dtype]
    return Cost(flops=6.0 * problem.d * rows * waste * slow, bytes=token + gathered)


TEMPLATE = Template(
    name="dq",
    fields=frozenset({"dtype", "d", "g", "gate", "k", "w", "n", "rows"}),
    space=(
        Param("BM", Pow2(16, 128)),
        Param("BN", Pow2(16, 128)),
        Param("num_warps", Choice((4, 8))),
        Param("num_stages", Choice((1, 2, 3))),
        Param("registers", Choice((255, 168, 128))),
    ),
    default=_default,
    check=_check,
    cost=_cost,
    sources=(__file__, tiles_file),
)
