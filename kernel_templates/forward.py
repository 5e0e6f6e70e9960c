"""Forward: one softmax over the window and the selected keys, gates on the fly.

Per tile of queries: saturated keys (no mask, no gate), the other selected keys (mask and gate), the window (contiguous,
causal, no gate). Online softmax in base 2 (Milakov and Gimelshein 2018; FlashAttention-2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .base import DTYPE_BYTES, Choice, Config, Cost, Param, Pow2, Template, next_pow2
from .tiles import (
    GATE_KV,
    GATE_NONE,
    LOG2E,
    default_tile,
    gate,
    list_range,
    load_rows,
    masked_run,
    mma_cost,
    store_rows,
    tile_error,
)
from .tiles import __file__ as tiles_file


@triton.jit
def _accumulate(acc, peak, norm, s, m, v, GATED: tl.constexpr):
    """One step of the online softmax: logits s (base 2), value gates m."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(peak - base)
    norm = norm * shrink + tl.sum(p, 1)
    if GATED:
        p = p * m
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, norm


@triton.jit(do_not_specialize=["N", "window", "segments", "KV_HEADS"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, u_ptr, tau_ptr, expiry_ptr, list_ptr, bounds_ptr, start_ptr, stop_ptr, o_ptr, lse_ptr,
    sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, so_b, so_h, so_n,
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
    q_ptr += batch * sq_b + head * G * sq_h
    k_ptr += batch * sk_b + head * sk_h
    v_ptr += batch * sv_b + head * sv_h
    u_ptr += row * N
    expiry_ptr += row * N
    at_row = i * sq_n + h * sq_h
    if WIDE:
        at_row = i.to(tl.int64) * sq_n + h.to(tl.int64) * sq_h
    q = load_rows(q_ptr, at_row, 1, ok, D, BD, WIDE)
    acc = tl.zeros([BM, BD], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    log_scale = scale * LOG2E
    n = tl.arange(0, BN)

    if SELECTED:
        slot = row * segments + first // SEGMENT
        list_ptr += slot * CAP
        lo, free, free_end, hi = list_range(bounds_ptr, start_ptr + row * N, stop_ptr + row * N, slot, first, last, BN)
        # The next block's indices are loaded one step early, so that the gathers below do not wait for them.
        j = tl.load(list_ptr + free + n, mask=free + n < free_end, other=0)
        for at in range(free, free_end, BN):
            ahead = at + BN + n
            next_j = tl.load(list_ptr + ahead, mask=ahead < free_end, other=0)
            every = n < BN
            k = load_rows(k_ptr, j, sk_n, every, D, BD, WIDE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale
            v = load_rows(v_ptr, j, sv_n, every, D, BD, WIDE)
            acc, peak, norm = _accumulate(acc, peak, norm, s, s, v, False)
            j = next_j

        tau = tl.load(tau_ptr + row * N + i, mask=i < N, other=0.0)
        steps = tl.cdiv(free - lo, BN) + tl.cdiv(hi - free_end, BN)
        at, end = masked_run(0, lo, free, free_end, hi, BN)
        j = tl.load(list_ptr + at + n, mask=at + n < end, other=N)
        for step in range(0, steps):
            at, end = masked_run(step + 1, lo, free, free_end, hi, BN)
            next_j = tl.load(list_ptr + at + n, mask=(at + n < end) & (step + 1 < steps), other=N)
            every = j < N
            k = load_rows(k_ptr, j, sk_n, every, D, BD, WIDE)
            u = tl.load(u_ptr + j, mask=every, other=0.0)
            expiry = tl.load(expiry_ptr + j, mask=every, other=0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale
            g = gate(u[None, :], tau[:, None])
            if GATE == GATE_KV:
                s = s * g
            s = tl.where((i[:, None] < expiry[None, :]) & (i[:, None] >= (j + window)[None, :]), s, float("-inf"))
            v = load_rows(v_ptr, j, sv_n, every, D, BD, WIDE)
            acc, peak, norm = _accumulate(acc, peak, norm, s, g, v, GATE != GATE_NONE)
            j = next_j

    if WINDOW:
        for at in range(tl.maximum(first - window + 1, 0), last + 1, BN):
            j = at + n
            every = j <= last
            k = load_rows(k_ptr, j, sk_n, every, D, BD, WIDE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * log_scale
            s = tl.where((j[None, :] <= i[:, None]) & (j[None, :] > (i - window)[:, None]), s, float("-inf"))
            v = load_rows(v_ptr, j, sv_n, every, D, BD, WIDE)
            acc, peak, norm = _accumulate(acc, peak, norm, s, s, v, False)

    o = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    at_out = i * so_n + h * so_h
    if WIDE:
        at_out = i.to(tl.int64) * so_n + h.to(tl.int64) * so_h
    store_rows(o_ptr + batch * so_b + head * G * so_h, at_out, 1, ok, o, D, BD, WIDE)
    lse = (peak + tl.log2(norm)) / LOG2E
    tl.store(lse_ptr + (row * G + h) * N + i, lse, mask=ok)


def pairs(problem) -> float:
    """Selected and window pairs of one KV row: sum_i |S_i| + |N_i| (upper bound)."""
    reach = min(problem.k + problem.w, problem.n)
    return reach * (problem.n - reach / 2)


def _default(problem, device):
    return Config(default_tile(problem, 64, 64))


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
    ),
    default=_default,
    check=_check,
    cost=_cost,
    sources=(__file__, tiles_file),
)
