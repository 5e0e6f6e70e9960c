"""The events of ``threshold`` in order, and the table of their sums by time and block.

The sorted scores and the sorted scores minus one are merged as two sorted lists: a program finds by one search how many
of each its block of SPAN events holds, and places them by searches within the block. Then it sorts them by time, sums
them up in that order, and each time of the table finds its sums by bisection: exact in int64, and no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .filter import clamp, length

PROBES: tl.constexpr = tl.constexpr(64)  # of one step of the search for a block's first events


@triton.jit
def fraction_bits(us_ptr, M, LOG_EVENTS: tl.constexpr):
    """Bits after the point of the row's fixed-point numbers: as many as sums over 2M events allow."""
    top = tl.maximum(tl.abs(tl.load(us_ptr)), tl.abs(tl.load(us_ptr + M - 1)))
    top = tl.maximum(tl.minimum(top, 1048576.0), 1.0)
    shift = 60 - LOG_EVENTS - tl.ceil(tl.log2(top + 1.0)).to(tl.int32)
    return tl.minimum(shift, 40)


@triton.jit
def quantise(u, one):
    return (clamp(u).to(tl.float64) * one.to(tl.float64)).to(tl.int64)


@triton.jit
def _plus_before(us_ptr, M, at, one, STEPS: tl.constexpr):
    """How many of the events before each of the places ``at`` are plus events."""
    low = tl.maximum(at - M, 0)
    high = tl.minimum(at, M)
    probe = tl.arange(0, PROBES)[None, :]
    for _ in tl.static_range(STEPS):
        step = (high - low + PROBES - 1) // PROBES
        plus = low[:, None] + (probe + 1) * step[:, None] - 1
        minus = at[:, None] - 1 - plus
        inside = (step[:, None] > 0) & (plus < high[:, None])
        q = quantise(tl.load(us_ptr + plus, mask=inside, other=0.0), one)
        other = quantise(tl.load(us_ptr + minus, mask=inside & (minus < M), other=0.0), one) - one
        before = inside & ((minus >= M) | (q >= other))  # equal values: plus comes before minus, F is continuous
        low += tl.sum(before.to(tl.int32), 1) * step
        high = tl.minimum(high, low + tl.maximum(step - 1, 0))
    return low


@triton.jit
def _event(us_ptr, order_ptr, s, plus0, plus1, minus0, count, one):
    """Score, key and kind of the s-th event of a block, plus events first: score, key, minus, index, live."""
    live = s < count
    minus = s >= plus1 - plus0
    index = tl.where(minus, minus0 + s - (plus1 - plus0), plus0 + s)
    u = tl.load(us_ptr + index, mask=live, other=0.0)
    t = tl.load(order_ptr + index, mask=live, other=0).to(tl.int32)
    return u, t, minus, index, live


@triton.jit
def _others_before(us_ptr, x, minus, plus0, plus1, minus0, minus1, one, STEPS: tl.constexpr):
    """The number of events of the other kind that come before each event of value x of the block."""
    low = tl.where(minus, plus0, minus0)
    high = tl.where(minus, plus1, minus1)
    bound = tl.where(minus, x - 1, x + one)  # scores above it come before: of minus events as they are plus one
    for _ in tl.static_range(STEPS):
        middle = (low + high) >> 1
        open_ = low < high
        above = quantise(tl.load(us_ptr + middle, mask=open_, other=0.0), one) > bound
        low = tl.where(open_ & above, middle + 1, low)
        high = tl.where(open_ & ~above, middle, high)
    return low


@triton.jit
def _time(t, K, fine_log, few, CHUNK_LOG: tl.constexpr):
    """The time of a key: 0 before query K, then by stretch."""
    since = t - K - (few << fine_log)
    time = tl.where(since < 0, (t - K) >> fine_log, few + (since >> CHUNK_LOG)) + 1
    return tl.where(t < K, 0, time)


@triton.jit
def _accumulate(ev_x_ptr, ev_t_ptr, sums_ptr, codes_ptr, first, count, K, fine_log, few, CHUNK_LOG: tl.constexpr,
                PIECE: tl.constexpr, LOG_PIECE: tl.constexpr):  # fmt: skip
    """Sort the events of a piece by time and sum up: by place in that order, signed values so far, and below the time
    the number of plus events so far."""
    at = tl.arange(0, PIECE)
    live = at < count
    event = tl.load(ev_t_ptr + first + at, mask=live, other=0)
    key = (_time(event >> 1, K, fine_log, few, CHUNK_LOG) << LOG_PIECE) | at
    key = tl.sort(tl.where(live, (key << 1) | (event & 1), 0x7FFFFFFF))
    minus = key & 1
    x = tl.load(ev_x_ptr + first + ((key >> 1) & (PIECE - 1)), mask=live, other=0)
    tl.store(sums_ptr + first + at, tl.cumsum(tl.where(minus == 1, -x, x), 0), mask=live)
    # One bit more than a place takes: up to PIECE plus events.
    code = (key >> (LOG_PIECE + 1) << (LOG_PIECE + 1)) + tl.cumsum(1 - minus, 0)
    tl.store(codes_ptr + first + at, code, mask=live)


@triton.jit
def _until(sums_ptr, codes_ptr, time, first, count, LOG_PIECE: tl.constexpr):
    """Signs, signed values and plus events of a piece up to each time, int64."""
    n = time * 0
    for bit in tl.static_range(LOG_PIECE + 1):
        probe = n + (1 << (LOG_PIECE - bit)) - 1
        code = tl.load(codes_ptr + first + probe, mask=probe < count, other=0x7FFFFFFF)
        n = tl.where((code >> (LOG_PIECE + 1)) <= time, n + (1 << (LOG_PIECE - bit)), n)
    some = n > 0
    plus = tl.load(codes_ptr + first + n - 1, mask=some, other=0) & ((2 << LOG_PIECE) - 1)
    return (2 * plus - n).to(tl.int64), tl.load(sums_ptr + first + n - 1, mask=some, other=0), plus.to(tl.int64)


@triton.jit(do_not_specialize=["M", "K", "times", "fine_log", "few"])
def events_kernel(
    us_ptr, order_ptr, ev_x_ptr, ev_t_ptr, place_ptr, minus_at_ptr, sums_ptr, codes_ptr, table_ptr, first_x_ptr,
    first_rank_ptr, count_ptr, M, K, times, fine_log, few, LOG: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr,
    CHUNK_LOG: tl.constexpr, LOG_PIECE: tl.constexpr, TIMES: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """One block of events (axis 1) of a row (axis 0).

    In, [rows, M]: us float32, falling; order, their keys. Out: the events [rows, 2M], value int64 and 2 * key +
    is_minus int32; by key [rows, M]: rank << 32 + place of its plus event int64, place of its minus event int32; by
    block [rows, blocks]: value of its first event int64 and number of plus events before it int32; table int64
    [rows, times, 2, blocks]: number of plus events << 32 + signs, and signed values, of the block's events of keys up
    to each time (first those before query K). Scratch: sums int64 and codes int32 [rows, 2M].
    """
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64)
    m = length(count_ptr, row, M, COUNTED)
    if block * SPAN >= 2 * m:
        return
    us_ptr += row * M
    order_ptr += row * M
    ev_x_ptr += row * 2 * M
    ev_t_ptr += row * 2 * M
    place_ptr += row * M
    minus_at_ptr += row * M
    sums_ptr += row * 2 * M
    codes_ptr += row * 2 * M
    one = tl.full([], 1, tl.int64) << fraction_bits(us_ptr, m, LOG)
    ends = tl.minimum((block + tl.arange(0, 2)) * SPAN, 2 * m)
    plus = _plus_before(us_ptr, m, ends, one, (LOG + 5) // 6)
    is_first = tl.arange(0, 2) == 0
    begin = block * SPAN
    plus0 = tl.sum(tl.where(is_first, plus, 0), 0)
    plus1 = tl.sum(tl.where(is_first, 0, plus), 0)
    count = tl.minimum(SPAN, 2 * m - begin)
    minus0 = begin - plus0
    minus1 = begin + count - plus1
    tl.store(first_rank_ptr + row * blocks + block, plus0)
    lane = tl.arange(0, BLOCK)
    for s in range(0, count, BLOCK):
        u, t, minus, index, live = _event(us_ptr, order_ptr, s + lane, plus0, plus1, minus0, count, one)
        q = quantise(u, one)
        x = tl.where(minus, q - one, q)
        place = index + _others_before(us_ptr, x, minus, plus0, plus1, minus0, minus1, one, STEPS)
        tl.store(ev_x_ptr + place, x, mask=live)
        tl.store(ev_t_ptr + place, 2 * t + minus.to(tl.int32), mask=live)
        tl.store(place_ptr + t, (index.to(tl.int64) << 32) + place, mask=live & ~minus)
        tl.store(minus_at_ptr + t, place, mask=live & minus)
        tl.store(first_x_ptr + row * blocks + block + tl.zeros_like(place), x, mask=live & (place == begin))

    PIECE: tl.constexpr = 1 << LOG_PIECE
    tl.debug_barrier()
    for s in range(0, count, PIECE):
        _accumulate(
            ev_x_ptr, ev_t_ptr, sums_ptr, codes_ptr, begin + s, count - s, K, fine_log, few, CHUNK_LOG, PIECE, LOG_PIECE
        )
    tl.debug_barrier()
    table_ptr += row * times * 2 * blocks + block
    used = 1 + _time(m - 1, K, fine_log, few, CHUNK_LOG)
    for first in range(0, used, TIMES):
        time = first + tl.arange(0, TIMES)
        signs = tl.zeros([TIMES], tl.int64)
        values = signs
        pluses = signs
        for s in range(0, count, PIECE):
            sign, value, more = _until(sums_ptr, codes_ptr, time, begin + s, tl.minimum(count - s, PIECE), LOG_PIECE)
            signs += sign
            values += value
            pluses += more
        at = table_ptr + time.to(tl.int64) * 2 * blocks
        tl.store(at, (pluses << 32) | (signs & 0xFFFFFFFF), mask=time < used)
        tl.store(at + blocks, values, mask=time < used)
