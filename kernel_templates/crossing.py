"""When a window of events crosses: the keys that are new in a stretch of time, added to F of every event one by one.

This is where the walk of ``threshold`` spends most of its instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

KEYS: tl.constexpr = tl.constexpr(16)  # new keys between two looks at whether any event of a window still waits
FAR: tl.constexpr = tl.constexpr(1 << 29)  # from the origin of a stretch's narrow values, at most
NEVER: tl.constexpr = tl.constexpr(-(1 << 62))  # below all values
NEVER_NARROW: tl.constexpr = tl.constexpr(-(1 << 30))


@triton.jit
def _list(ptr, x, slot, add, new, none):
    """x at its slots, and after them what adds nothing, so that any KEYS may be read from there."""
    tl.store(ptr + slot, x, mask=add)
    tl.store(ptr + new + tl.arange(0, KEYS), none)


@triton.jit
def list_new_keys(x, near, add, new_t_ptr, new_x_ptr, narrow_ptr, c0, C: tl.constexpr, TAU: tl.constexpr):
    """List the stretch's keys that add to F anywhere in the range, in time order; returns their number."""
    count = add.to(tl.int32)
    slot = tl.cumsum(count, 0) - count
    new = tl.sum(count, 0)
    tl.store(new_t_ptr + slot, c0 + tl.arange(0, C), mask=add)
    if TAU:
        _list(narrow_ptr, near, slot, add, new, NEVER_NARROW)
        _list(new_x_ptr, x, slot, add, new, NEVER)
    else:
        _list(narrow_ptr, x, slot, add, new, 0x7FFFFFFF)
    return new


@triton.jit
def narrow(x, origin, drop):
    """x - origin without its last ``drop`` bits, in int32."""
    return tl.minimum(tl.maximum((x - origin) >> drop, -FAR), FAR).to(tl.int32)


@triton.jit
def both_any(a, b):
    """Whether any of a, and whether any of b: of up to 32767 each, by one reduction."""
    counts = tl.sum(a.to(tl.int32) + (b.to(tl.int32) << 16), 0)
    return (counts & 0xFFFF) > 0, counts > 0xFFFF


@triton.jit
def run(value, x, minus, new_x_ptr, n, new, one, limit, rounded, far, TAU: tl.constexpr):
    """How many of (the state before, the state after each new key) leave each event's F below goal, and below goal +
    limit, which only minus events wait for; and, where F is rounded, whether these differ for any event, or any is far.
    ``value`` is F - goal after n new keys, before which no event crosses."""
    reach = n + (value < 0).to(tl.int32)
    pass_ = n + (value - limit < 0).to(tl.int32)  # the sign of a difference is one instruction less than a comparison
    more = n >= 0
    unsure = n < 0
    while more:  # once at least: past the last key nothing is added
        for g in tl.static_range(KEYS):
            q = tl.load(new_x_ptr + n + g)
            if TAU:
                value += tl.minimum(tl.maximum(q - x, 0), one)
                pass_ += (value - limit < 0).to(tl.int32)
            else:
                value += (q < x).to(tl.int32)
            reach += (value < 0).to(tl.int32)
        n += KEYS
        if TAU:
            waits = (value < 0) | (minus & (value < limit))
            more, unsure = both_any(waits, far | (rounded & (reach != pass_)))
        else:
            more = tl.max((value < 0).to(tl.int32), 0) > 0
        more = more & (n < new)
    return reach, pass_, unsure


@triton.jit
def run_tau(value, x, minus, live, new_x_ptr, narrow_ptr, n, new, one, origin, drop, rounded, C: tl.constexpr):
    """:func:`run` of tau in int32, where that tells: a third of the instructions. Without their last ``drop`` bits F
    and the keys' contributions to it are each off by less than one, where any of them is rounded at all; two counts
    bound what is asked for, and where they differ for any event it is done again in int64."""
    x_near = narrow(x, origin, drop)
    room = one * (C + 1)  # what is further below the goal does not reach it in the stretch
    near = (tl.minimum(tl.maximum(value, -room), one) >> drop).to(tl.int32)
    error = tl.where(rounded, new + 1, 0)
    reach, pass_, unsure = run(
        near - error, x_near, minus, narrow_ptr, n, new, (one >> drop).to(tl.int32),
        tl.where(rounded, -2 * error, 1), live & rounded, live & (x_near <= -FAR), True,
    )  # fmt: skip
    if unsure:
        never = minus & (n < 0)
        reach, pass_, unsure = run(value, x, minus, new_x_ptr, n, new, one, 1, never, never, True)
    return reach, pass_
