"""The walk of ``threshold``: over a stretch of time, when does F_t reach its goal at which event?

F_t never decreases with t, so every event crosses its goal once; which events can cross within a stretch is one
contiguous range of the event list, bounded by the table of block sums. Of that range only the events of keys born by
the end of the stretch count: they are picked out, in order, into a ring buffer, and taken from there a window at a
time. A window lies in registers: F before the stretch by one cumulative sum, then the stretch's new keys in time
order, each added to the whole window at once, while every event counts how long it stays below its goal (``crossing``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .crossing import KEYS, NEVER, both_any, list_new_keys, narrow, run, run_tau
from .events import fraction_bits, quantise
from .filter import length


@triton.jit
def _start(p, K, fine, few, C: tl.constexpr):
    return K + tl.minimum(p, few) * fine + tl.maximum(p - few, 0) * C


@triton.jit
def _count(packed, TAU: tl.constexpr):
    """Of signs, or of plus events: both in one int64 (``events_kernel``)."""
    return (packed if TAU else packed >> 32).to(tl.int32)


@triton.jit
def _edges(table_ptr, first_x_ptr, first_rank_ptr, p, width, M, goal, limit, BLOCKS: tl.constexpr, SPAN: tl.constexpr,
           TAU: tl.constexpr):  # fmt: skip
    """Events [low, high) hold all that can cross in stretch p; sums over the events before low, of earlier keys; and
    the value of low."""
    b = tl.arange(0, BLOCKS)
    blocks = tl.cdiv(2 * M, SPAN)
    inside = b < blocks
    at = table_ptr + p * 2 * width + b
    counts = _count(tl.load(at, mask=inside, other=0), TAU)
    later = _count(tl.load(at + 2 * width, mask=inside, other=0), TAU)
    before = tl.cumsum(counts, 0) - counts
    before_later = tl.cumsum(later, 0) - later
    if TAU:
        totals = tl.load(at + width, mask=inside, other=0)
        later_totals = tl.load(at + 3 * width, mask=inside, other=0)
        x = tl.load(first_x_ptr + b, mask=inside, other=0)
        value_at = x
        total = tl.cumsum(totals, 0) - totals
        value = total - before * x
        value_after = tl.cumsum(later_totals, 0) - later_totals - before_later * x
        start = b * SPAN
        last = 2 * M
    else:
        start = tl.load(first_rank_ptr + b, mask=inside, other=0)
        total = before
        value_at = before
        value = before
        value_after = before_later
        last = M
    first = tl.sum((inside & (value_after < goal)).to(tl.int32), 0) - 1  # F is 0 < goal before the first event
    end = tl.sum((inside & (value < limit)).to(tl.int32), 0)
    at_first = b == first
    high = tl.where(end < blocks, tl.sum(tl.where(b == end, start, 0), 0), last)
    return (
        tl.sum(tl.where(at_first, start, 0), 0), high, tl.sum(tl.where(at_first, before, 0), 0),
        tl.sum(tl.where(at_first, total, 0), 0), tl.sum(tl.where(at_first, value_at, 0), 0),
    )  # fmt: skip


@triton.jit
def _among(x, s, SUBS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SUBS) == s, x, 0), 0)


@triton.jit
def _signed(x, sign):
    return tl.where(sign > 0, x, tl.where(sign < 0, -x, 0))


@triton.jit
def _skip(counts, totals, edge, t, sign, x, live, goal, TAU: tl.constexpr):
    """The last part of the stretch (edge: where each starts) before which no event of a window crosses; and the sums
    over the events up to the window's end, of keys before each part."""
    inside = live[None, :] & (t[None, :] < edge[:, None])
    counts += tl.sum(tl.where(inside, sign[None, :], 0), 1)
    value = counts
    if TAU:
        totals += tl.sum(tl.where(inside, _signed(x, sign)[None, :], 0), 1)
        value = totals - counts * tl.min(tl.where(live, x, 1 << 62), 0)
    part = tl.maximum(tl.sum((value < goal).to(tl.int32), 0) - 1, 0)
    return part, counts, totals


@triton.jit
def _time(states, new_t_ptr, new, c0):
    """When an event crosses that stays below its goal for ``states`` states; past all time for never in the stretch."""
    inside = (states > 0) & (states <= new)
    t = tl.load(new_t_ptr + states - 1, mask=inside, other=0)
    return tl.where(inside, t, tl.where(states == 0, c0 - 1, 0x7FFFFFFF))


@triton.jit
def _change(change_ptr, at, counts, total, mask, C: tl.constexpr):
    tl.atomic_add(change_ptr + at, counts, mask=mask, sem="relaxed")  # integers: the order does not matter
    tl.atomic_add(change_ptr + C + at, total, mask=mask, sem="relaxed")


@triton.jit
def _changes(change_ptr, t, sign, x, minus, reach, pass_, reach_t, pass_t, new, c0, live, C: tl.constexpr):
    """Add a window's events to the changes of the sums, by time. Two counts lie in one int64: of the events whose F is
    below K (low half), and of those of interior keys (high half), where a minus event ends once F is above K."""
    old = t < c0
    ends = tl.where(minus, pass_, reach)
    end_t = tl.where(minus, pass_t, reach_t)
    sign = sign.to(tl.int64)
    high = sign << 32
    counted = old | (reach_t > t)
    born = live & ~old & (end_t > t)
    low = tl.where(reach_t > t, sign, 0)
    _change(change_ptr, t - c0, high + low, low * x, born, C)
    leaves = live & counted & (reach > 0) & (reach <= new)
    both = tl.where(end_t == reach_t, high, 0) + sign
    _change(change_ptr, reach_t - c0, -both, -sign * x, leaves, C)
    leaves = live & minus & (old | (end_t > t)) & (ends > 0) & (ends <= new) & (end_t != reach_t)
    tl.atomic_add(change_ptr + end_t - c0, -high, mask=leaves, sem="relaxed")


@triton.jit
def _walk(
    table_ptr, first_x_ptr, first_rank_ptr, ev_x_ptr, ev_t_ptr, scores_ptr, place_ptr, minus_at_ptr, ring_ptr,
    new_t_ptr, new_x_ptr, narrow_ptr, change_ptr, tau_ptr, interior_ptr, plus_end_ptr, minus_end_ptr, p, blocks, M, K,
    shift, fine, few, bits, BLOCKS: tl.constexpr, SPAN: tl.constexpr, C: tl.constexpr, NARROW_BITS: tl.constexpr,
    WINDOW: tl.constexpr, SCAN: tl.constexpr, RING: tl.constexpr, SUBS: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    c0 = _start(p, K, fine, few, C)
    c1 = tl.minimum(c0 + tl.where(p < few, fine, C), M)
    goal = K
    limit = goal
    one = goal * 0 + 1
    if TAU:
        one = tl.full([], 1, tl.int64) << bits
        goal = K.to(tl.int64) * one
        limit = goal + 1  # a saturated key stops being so once F(u - 1) is above K
        tl.store(change_ptr + tl.arange(0, C), tl.zeros([C], tl.int64))
        tl.store(change_ptr + C + tl.arange(0, C), tl.zeros([C], tl.int64))
    # The stretch's keys are loaded before anything waits for the table.
    key = c0 + tl.arange(0, C)
    mine = key < c1
    packed = tl.load(place_ptr + key, mask=mine, other=0)
    if TAU:
        minus_at = tl.load(minus_at_ptr + key, mask=mine, other=0)
        plus_at = (packed & 0xFFFFFFFF).to(tl.int32)
        q = quantise(tl.load(scores_ptr + key, mask=mine, other=0.0), one)
    else:
        q = (packed >> 32).to(tl.int32)
        plus_at = q
        minus_at = plus_at
    low, high, count, total, origin = _edges(
        table_ptr, first_x_ptr, first_rank_ptr, p, blocks, M, goal, limit, BLOCKS, SPAN, TAU
    )  # fmt: skip
    listed = mine & (plus_at < high)
    near = q
    drop = tl.maximum(bits - NARROW_BITS, 0)
    rounded = low < 0
    if TAU:
        near = narrow(q, origin, drop)
        rounded = tl.max((listed & (((q - origin) & ((1 << drop) - 1)) != 0)).to(tl.int32), 0) > 0
    new = list_new_keys(q, near, listed, new_t_ptr, new_x_ptr, narrow_ptr, c0, C, TAU)

    # Sums over the events before the window, of keys born before each part of the stretch.
    edge = c0 + tl.arange(0, SUBS) * (C // SUBS)
    counts_s = count + tl.zeros([SUBS], tl.int32)
    totals_s = total + tl.zeros([SUBS], total.dtype)
    skips = (SUBS > 1) & (new > C // 4)  # fewer new keys are walked over faster than they are skipped
    walked = edge * 0
    if skips:
        earlier = key[None, :] < edge[:, None]
        walked = tl.sum((earlier & listed[None, :]).to(tl.int32), 1)
        before_low = (mine & (plus_at < low)).to(tl.int32)
        if TAU:
            gone = (mine & (minus_at < low)).to(tl.int32)
            totals_s += tl.sum(tl.where(earlier, (before_low * q - gone * (q - one))[None, :], 0), 1)
            before_low -= gone
        counts_s += tl.sum(tl.where(earlier, before_low[None, :], 0), 1)

    s = tl.arange(0, SCAN)
    w = tl.arange(0, WINDOW)
    # Of the events that have not crossed before the stretch, by place in a window: count twice, and total.
    base = tl.where(w == 0, (count.to(tl.int64) << 32) + count, 0)
    base_total = tl.where(w == 0, total, 0)
    passed = high  # events from here on have crossed before the stretch
    root = tl.full([], NEVER, tl.int64)  # the largest x found with F >= K before the stretch
    at = low
    head = low * 0
    tail = low * 0
    code = tl.load(ev_t_ptr + at + s, mask=at + s < high, other=0).to(tl.int32)
    more = at < high
    while more:
        while (tail - head < WINDOW) & (at < high):
            following = tl.load(ev_t_ptr + at + SCAN + s, mask=at + SCAN + s < high, other=0).to(tl.int32)
            born = code >> 1 if TAU else code
            keep = (at + s < high) & (born < c1)
            kept = keep.to(tl.int32)
            slot = (tail + tl.cumsum(kept, 0) - kept) & (RING - 1)
            tl.store(ring_ptr + slot, at + s, mask=keep)
            tail += tl.sum(kept, 0)
            at += SCAN
            code = following
        tl.debug_barrier()
        live = head + w < tail
        place = tl.load(ring_ptr + ((head + w) & (RING - 1)), mask=live, other=0)
        event = tl.load(ev_t_ptr + place, mask=live, other=0).to(tl.int32)
        if TAU:
            t = event >> 1
            minus = (event & 1) == 1
            x = tl.load(ev_x_ptr + place, mask=live, other=0)
            sign = tl.where(minus, -1, 1)
            old = live & (t < c0)
            signs = tl.where(old, sign, 0)
            weights = _signed(x, signs)
            skipped = low * 0
            if skips:
                # Where parts are skipped no event has crossed before the stretch: F after them tells the same.
                part, counts_after, totals_after = _skip(counts_s, totals_s, edge, t, sign, x, live, goal, TAU)
                skipped = _among(walked, part, SUBS)
                then = tl.where(live & (t < c0 + part * (C // SUBS)), sign, 0)
                moments = _signed(x, then)
                value = _among(totals_s, part, SUBS) + tl.cumsum(moments, 0) - moments
                value -= (_among(counts_s, part, SUBS) + tl.cumsum(then, 0) - then) * x
                counts_s = counts_after
                totals_s = totals_after
            else:
                value = total + tl.cumsum(weights, 0) - weights - (count + tl.cumsum(signs, 0) - signs) * x
                count += tl.sum(signs, 0)
                total += tl.sum(weights, 0)
            below = value < goal
            own = tl.where(below | (minus & (value < limit)), signs, 0).to(tl.int64) << 32
            base += own + tl.where(below, signs, 0)
            base_total += tl.where(below, weights, 0)
            crossed = live & ~below
        else:
            t = event
            minus = live & False
            x = place
            skipped = low * 0
            if skips:
                ones = live.to(tl.int32)
                part, counts_after, totals_after = _skip(counts_s, totals_s, edge, t, ones, x, live, goal, TAU)
                skipped = _among(walked, part, SUBS)
                olds = (live & (t < c0 + part * (C // SUBS))).to(tl.int32)
                value = _among(counts_s, part, SUBS) + tl.cumsum(olds, 0) - olds
                counts_s = counts_after
            else:
                olds = (live & (t < c0)).to(tl.int32)
                value = count + tl.cumsum(olds, 0) - olds
                count += tl.sum(olds, 0)
            crossed = live & (value >= goal)
        rest = tl.where(live, value - goal, one)
        if TAU:
            done, inexact = both_any(crossed, live & ((((x - origin) | rest) & ((1 << drop) - 1)) != 0))
            if done:
                # Below the root nothing waits: where F is K on an interval no key, and so no minus event, lies inside.
                root = tl.maximum(root, tl.max(tl.where(crossed, x, NEVER), 0))
                done = tl.max((crossed & ((value >= limit) | (x < root))).to(tl.int32), 0) > 0
            reach, pass_ = run_tau(
                rest, x, minus, live, new_x_ptr, narrow_ptr, skipped, new, one, origin, drop, rounded | inexact, C
            )
            reach_t = _time(reach, new_t_ptr, new, c0)
            pass_t = _time(pass_, new_t_ptr, new, c0)
            _changes(change_ptr, t, sign, x, minus, reach, pass_, reach_t, pass_t, new, c0, live, C)
            ends = live & (pass_ <= new) & ((t >= c0) | (pass_ > 0))
            tl.store(minus_end_ptr + t, tl.maximum(pass_t, t) + shift, mask=ends & minus)
        else:
            done = tl.max(crossed.to(tl.int32), 0) > 0
            reach, pass_, _ = run(rest, x, minus, narrow_ptr, skipped, new, one, 0, minus, minus, False)
            reach_t = _time(reach, new_t_ptr, new, c0)
        ends = live & ~minus & (reach <= new) & ((t >= c0) | (reach > 0))
        tl.store(plus_end_ptr + t, tl.maximum(reach_t, t) + shift, mask=ends)
        if done:
            passed = tl.max(tl.where(live, place, 0), 0) + 1
        head += WINDOW
        tl.debug_barrier()
        more = ~done & ((at < high) | (head < tail))
    _finish(
        q, plus_at, minus_at, change_ptr, tau_ptr, interior_ptr, plus_end_ptr, minus_end_ptr, c0, c1, low, passed,
        tl.sum(base, 0), tl.sum(base_total, 0), goal, shift, one, C, TAU,
    )  # fmt: skip


@triton.jit
def _finish(
    q, plus_at, minus_at, change_ptr, tau_ptr, interior_ptr, plus_end_ptr, minus_end_ptr, c0, c1, low, passed, base,
    base_total, goal, shift, one, C: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """The new keys whose events lie outside of the range, and the results by query."""
    t = c0 + tl.arange(0, C)
    live = t < c1
    if TAU:
        plus = live & (plus_at < low)
        minus = live & (minus_at < low)
        sign = plus.to(tl.int64) - minus.to(tl.int64)
        counts = tl.load(change_ptr + t - c0, mask=live, other=0, cache_modifier=".cg") + sign + (sign << 32)
        totals = tl.load(change_ptr + C + t - c0, mask=live, other=0, cache_modifier=".cg")
        totals += tl.where(plus, q, 0) - tl.where(minus, q - one, 0)
        counts = base + tl.cumsum(counts, 0)
        totals = base_total + tl.cumsum(totals, 0)
        count = (counts << 32) >> 32
        interior = (counts - count) >> 32
        tau = (totals - goal).to(tl.float64) / (tl.maximum(count, 1).to(tl.float64) * one.to(tl.float64))
        tl.store(tau_ptr + t + shift, tau.to(tl.float32), mask=live)
        tl.store(interior_ptr + t + shift, interior.to(tl.int32), mask=live)
        tl.store(minus_end_ptr + t, t + shift, mask=live & (minus_at >= passed))
    tl.store(plus_end_ptr + t, t + shift, mask=live & (plus_at >= passed))


@triton.jit(do_not_specialize=["K", "M", "N", "shift", "fine", "few", "blocks", "stretches", "first"])
def walk_kernel(
    scores_ptr, table_ptr, first_x_ptr, first_rank_ptr, us_ptr, ev_x_ptr, ev_t_ptr, order_ptr, place_ptr, minus_at_ptr,
    ring_ptr, new_t_ptr, new_x_ptr, narrow_ptr, change_ptr, tau_ptr, interior_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr,
    count_ptr, first, stretches, blocks, M, N, shift, K, fine, few, LOG: tl.constexpr, BLOCKS: tl.constexpr,
    SPAN: tl.constexpr, C: tl.constexpr, NARROW_BITS: tl.constexpr, WINDOW: tl.constexpr, SCAN: tl.constexpr,
    RING: tl.constexpr, SUBS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """The results of a stretch of queries and of the keys that change in it, for tau or ranks, of a row (axis 0).

    Program axis 1: the stretch, from ``first``, for tau, which takes longer and so starts first, and then for ranks; of
    either the first ones, in which most happens, start first. ``few`` stretches have ``fine`` keys, the others C.
    ``shift`` is the window: prefix t is query t + shift's. Scratch by program: ring int32 [RING], new_t int32 [C],
    new_x int64 [C + KEYS], narrow int32 [C + KEYS], change int64 [2, C]. NARROW_BITS: ``threshold.narrow_bits``.
    """
    row = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(1) // 2
    is_tau = tl.program_id(1) < programs
    p = first + tl.program_id(1) % programs
    m = length(count_ptr, row, M, COUNTED)
    if _start(p, K, fine, few, C) >= m:
        return
    task = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    table_ptr += row * (stretches + 1) * 2 * blocks
    first_x_ptr += row * blocks
    first_rank_ptr += row * blocks
    scores_ptr += row * N
    place_ptr += row * M
    minus_at_ptr += row * M
    ring_ptr += task * RING
    new_t_ptr += task * C
    new_x_ptr += task * (C + KEYS)
    narrow_ptr += task * (C + KEYS)
    if is_tau:
        bits = fraction_bits(us_ptr + row * M, m, LOG)
        _walk(
            table_ptr, first_x_ptr, first_rank_ptr, ev_x_ptr + row * 2 * M, ev_t_ptr + row * 2 * M, scores_ptr,
            place_ptr, minus_at_ptr, ring_ptr, new_t_ptr, new_x_ptr, narrow_ptr, change_ptr + task * 2 * C,
            tau_ptr + row * N, interior_ptr + row * N, sup_end_ptr + row * N, sat_end_ptr + row * N, p, blocks, m, K,
            shift, fine, few, bits, BLOCKS, SPAN, C, NARROW_BITS, WINDOW, SCAN, RING, SUBS, True,
        )  # fmt: skip
    else:
        _walk(
            table_ptr, first_x_ptr, first_rank_ptr, ev_x_ptr, order_ptr + row * M, scores_ptr, place_ptr, minus_at_ptr,
            ring_ptr, new_t_ptr, new_x_ptr, narrow_ptr, change_ptr, tau_ptr, interior_ptr, expiry_ptr + row * N,
            expiry_ptr, p, blocks, m, K, shift, fine, few, 0, BLOCKS, SPAN, C, NARROW_BITS, WINDOW, SCAN, RING, SUBS,
            False,
        )  # fmt: skip
