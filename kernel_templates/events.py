"""The events of ``threshold`` in order, and the table of their sums by time and block.

The sorted scores and the sorted scores minus one are merged as two sorted lists: a program finds by one search how many
of each its block of SPAN events holds, and places them by searches within the block. As it owns all times of the
block, it also sums them by time: a one-hot matrix of times, times the values cut into limbs of LIMB bits, on the tensor
cores. Limbs and ones are exact in float16 and so are sums of up to 2^24 / 2^LIMB of them in float32; put together
modulo 2^64 they are the exact sums of int64, without atomics and whatever the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIMB: tl.constexpr = tl.constexpr(10)
MASK: tl.constexpr = tl.constexpr(1023)
LIMBS: tl.constexpr = tl.constexpr(7)  # of 64 bits; one more column counts: 2048 for a plus event, 1 for a minus event
COLUMNS: tl.constexpr = tl.constexpr(8)
EXACT: tl.constexpr = tl.constexpr(1024)  # so many of them add up exactly
PROBES: tl.constexpr = tl.constexpr(64)  # of one step of the search for a block's first events


@triton.jit
def fixed_point(us_ptr, M, LOG_EVENTS: tl.constexpr):
    """The row's fixed-point unit 1.0 (int64): as large as sums over 2M events allow."""
    top = tl.maximum(tl.abs(tl.load(us_ptr)), tl.abs(tl.load(us_ptr + M - 1)))
    top = tl.maximum(tl.minimum(top, 1048576.0), 1.0)
    shift = 60 - LOG_EVENTS - tl.ceil(tl.log2(top + 1.0)).to(tl.int32)
    return tl.full([], 1, tl.int64) << tl.minimum(shift, 40)


@triton.jit
def quantise(u, one):
    return (tl.maximum(tl.minimum(u, 1048576.0), -1048576.0).to(tl.float64) * one.to(tl.float64)).to(tl.int64)


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
def _limbs(x, minus):
    """Limbs of the signed value of every event, and what counts it: float16 [events, COLUMNS]."""
    column = tl.arange(0, COLUMNS)[None, :]
    signed = tl.where(minus, -x, x)[:, None]
    limb = (signed >> (column * LIMB).to(tl.int64)).to(tl.int32) & MASK
    # 0x6400 + limb are the bits of 1024 + limb, and 0x6A00 those of 3072.
    bits = tl.where(column < LIMBS, limb | 0x6400, tl.where(minus[:, None], 0x6401, 0x6A00))
    return bits.to(tl.int16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _add(sums, limbs_ptr, time, live, HIGH: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """Add events to their times' sums, float32 [HIGH, LOW * COLUMNS]: time = high * LOW + low."""
    column = tl.arange(0, LOW * COLUMNS)[None, :]
    # The mask leaves an event's limbs in the columns of its own time: most of the loads do not take place.
    event = tl.arange(0, BLOCK)[:, None]
    own = (time & (LOW - 1))[:, None] == column // COLUMNS
    values = tl.load(limbs_ptr + event * COLUMNS + column % COLUMNS, mask=own & live[:, None], other=0.0)
    high = tl.where(live, time // LOW, -1)[None, :] == tl.arange(0, HIGH)[:, None]
    return tl.dot(high.to(tl.float16), values, sums)


@triton.jit
def _put_together(sums, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Values, and numbers of plus and of minus events, by time: int64 [HIGH * LOW]."""
    sums = tl.reshape(sums, [HIGH * LOW, COLUMNS]).to(tl.int32)
    column = tl.arange(0, COLUMNS)[None, :]
    values = tl.where(column < LIMBS, sums.to(tl.int64) << (column * LIMB).to(tl.int64), 0)
    counts = tl.sum(tl.where(column == LIMBS, sums, 0), 1)
    return tl.sum(values, 1), (counts >> 11).to(tl.int64), (counts & 2047).to(tl.int64)


@triton.jit(do_not_specialize=["M", "K", "times", "fine_log", "few"])
def events_kernel(
    us_ptr, order_ptr, ev_x_ptr, ev_t_ptr, place_ptr, minus_at_ptr, limbs_ptr, table_ptr, first_x_ptr, first_rank_ptr,
    M, K, times, fine_log, few, LOG: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr, CHUNK_LOG: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of events (axis 0) of a row (axis 1).

    In, [rows, M]: us float32, falling; order, their keys. Out: the events [rows, 2M], value int64 and 2 * key +
    is_minus int32; by key [rows, M]: rank << 32 + place of its plus event int64, place of its minus event int32; by
    block [rows, blocks]: value of its first event int64 and number of plus events before it int32; table int64
    [rows, times, 3, blocks]: signs, signed values and number of plus events, of the block's events of keys up to each
    time (first those before query K). Scratch: limbs float16 [rows, 2M, COLUMNS].
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    us_ptr += row * M
    order_ptr += row * M
    ev_x_ptr += row * 2 * M
    ev_t_ptr += row * 2 * M
    place_ptr += row * M
    minus_at_ptr += row * M
    limbs_ptr += row * 2 * M * COLUMNS
    one = fixed_point(us_ptr, M, LOG)
    ends = tl.minimum((block + tl.arange(0, 2)) * SPAN, 2 * M)
    plus = _plus_before(us_ptr, M, ends, one, (LOG + 5) // 6)
    is_first = tl.arange(0, 2) == 0
    begin = block * SPAN
    plus0 = tl.sum(tl.where(is_first, plus, 0), 0)
    plus1 = tl.sum(tl.where(is_first, 0, plus), 0)
    count = tl.minimum(SPAN, 2 * M - begin)
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
        at = limbs_ptr + place.to(tl.int64)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(at, _limbs(x, minus), mask=live[:, None])
        tl.store(first_x_ptr + row * blocks + block + tl.zeros_like(place), x, mask=live & (place == begin))

    tl.debug_barrier()
    table_ptr += row * times * 3 * blocks + block
    cell = tl.arange(0, HIGH * LOW)
    before = cell * 0
    sign_carry = tl.full([], 0, tl.int64)
    value_carry = sign_carry
    plus_carry = sign_carry
    for first in range(0, times, HIGH * LOW):
        signs = before.to(tl.int64)
        values = signs
        pluses = signs
        for group in range(0, count, EXACT):
            sums = tl.zeros([HIGH, LOW * COLUMNS], tl.float32)
            for s in range(group, tl.minimum(group + EXACT, count), BLOCK):
                live = s + lane < count
                event = begin + s + lane
                code = tl.load(ev_t_ptr + event, mask=live, other=0)
                time = _time(code >> 1, K, fine_log, few, CHUNK_LOG) - first
                live &= (time >= 0) & (time < HIGH * LOW)
                sums = _add(sums, limbs_ptr + (begin + s).to(tl.int64) * COLUMNS, time, live, HIGH, LOW, BLOCK)
            some_values, some_plus, some_minus = _put_together(sums, HIGH, LOW)
            signs += some_plus - some_minus
            values += some_values
            pluses += some_plus
        inside = first + cell < times
        at = table_ptr + (first + cell).to(tl.int64) * 3 * blocks
        tl.store(at, sign_carry + tl.cumsum(signs, 0), mask=inside)
        tl.store(at + blocks, value_carry + tl.cumsum(values, 0), mask=inside)
        tl.store(at + 2 * blocks, plus_carry + tl.cumsum(pluses, 0), mask=inside)
        sign_carry += tl.sum(signs, 0)
        value_carry += tl.sum(values, 0)
        plus_carry += tl.sum(pluses, 0)
