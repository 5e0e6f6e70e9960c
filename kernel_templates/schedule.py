"""Schedule: per segment of SEGMENT queries, the keys that its queries select, in an order that serves every kernel.

A segment's list holds, one after the other:
  1. the keys alive at its start that are dropped inside it, by expiry;
  2. those that outlive it and are not saturated (gate 1) for all of it, by position;
  3. those that outlive it and are saturated for all of it, by position (no mask, no gate);
  4. the keys born inside it that outlive it, by position;
  5. those born and dropped inside it, by position.
A tile of queries reads a contiguous range, from the first key of part 1 that is still alive to the last of part 4 born,
and part 5 up to the last born. Parts 1 to 3 come from the keys alive at the segment's start, found level by level: a
node's alive keys are its parent's that live on, and those born since. Where there is more than one level, the keys
that any query selects are listed first: of scores without a trend they are few. Part 1 is sorted by scattering its keys
to the queries that drop them, at most one each.
Design fact 2 bounds each list: at most ``min(k, M) + SEGMENT`` keys.
"""

from __future__ import annotations

from pathlib import Path

import triton
import triton.language as tl

from .base import Choice, Config, Cost, Param, Pow2, Template, next_pow2
from .filter import before


@triton.jit
def _append(list_ptr, count, j, keep):
    """Append the kept entries of j, in order; returns the new count."""
    kept = keep.to(tl.int32)
    tl.store(list_ptr + count + tl.cumsum(kept, 0) - kept, j, mask=keep)
    return count + tl.sum(kept, 0)


@triton.jit
def _sift(list_ptr, evicted_ptr, count, j, expiry, inside, begin, end, EVICTED: tl.constexpr):
    """Of keys in order: append those that live until ``end``; with EVICTED, write those alive at ``begin`` that do not
    to the queries that drop them. Returns the new count."""
    if EVICTED:
        tl.store(evicted_ptr + expiry, j, mask=inside & (expiry > begin) & (expiry < end))
    return _append(list_ptr, count, j, inside & (expiry >= end))


@triton.jit
def _sift_list(
    keys_ptr, i, stop, first, last, expiry_ptr, list_ptr, evicted_ptr, count, begin, end, EVICTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``_sift`` of entries [i, stop) of a list of keys, of those in [first, last)."""
    at = tl.arange(0, BLOCK)
    j = tl.load(keys_ptr + i + at, mask=i + at < stop, other=-1)
    while i < stop:
        ahead = i + BLOCK + at
        next_j = tl.load(keys_ptr + ahead, mask=ahead < stop, other=-1)
        inside = (j >= first) & (j < last)
        expiry = tl.load(expiry_ptr + j, mask=inside, other=0)
        count = _sift(list_ptr, evicted_ptr, count, j, expiry, inside, begin, end, EVICTED)
        j = next_j
        i += BLOCK
    return count


@triton.jit
def _lasting(
    expiry_ptr, keys_ptr, starts_ptr, parent_ptr, parent_count_ptr, list_ptr, evicted_ptr, row, begin, end, M, window,
    parents, blocks, CAP, EVICTED: tl.constexpr, LISTED: tl.constexpr, PARENT_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """List the keys selected from before query ``begin`` until ``end``, by position; returns their number. PARENT_SIZE
    0: no parent. LISTED: the keys to look at are listed. Every load but those of listed keys' expiry runs one block
    ahead of its use."""
    count = begin * 0
    first = -window
    if PARENT_SIZE > 0:
        parent = begin // PARENT_SIZE
        first = parent * PARENT_SIZE - window
        slot = row * parents + parent
        inherited = tl.load(parent_count_ptr + slot)
        count = _sift_list(
            parent_ptr + slot * CAP, begin * 0, inherited, 0, M, expiry_ptr, list_ptr, evicted_ptr, count, begin, end,
            EVICTED, BLOCK,
        )  # fmt: skip
    first = tl.maximum(first, 0)
    last = tl.minimum(begin - window, M)
    if LISTED:
        starts_ptr += row * (blocks + 1)
        if last > first:
            start = tl.load(starts_ptr + first // STRIDE)
            stop = tl.load(starts_ptr + tl.cdiv(last, STRIDE))
            count = _sift_list(
                keys_ptr + row * M, start, stop, first, last, expiry_ptr, list_ptr, evicted_ptr, count, begin, end,
                EVICTED, BLOCK,
            )  # fmt: skip
    else:
        at = tl.arange(0, BLOCK)
        expiry = tl.load(expiry_ptr + first + at, mask=first + at < last, other=0)
        for i in range(first, last, BLOCK):
            ahead = i + BLOCK + at
            next_expiry = tl.load(expiry_ptr + ahead, mask=ahead < last, other=0)
            count = _sift(list_ptr, evicted_ptr, count, i + at, expiry, i + at < last, begin, end, EVICTED)
            expiry = next_expiry
    return count


@triton.jit
def _selected(expiry_ptr, j, M, window):
    """Which of keys j any query selects."""
    return tl.load(expiry_ptr + j, mask=j < M, other=0) > j + window


@triton.jit(do_not_specialize=["N", "M", "window"])
def count_kernel(expiry_ptr, counts_ptr, N, M, window, BLOCK: tl.constexpr):
    """How many keys of each block any query selects: int32 [rows, blocks]."""
    row = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    selected = _selected(expiry_ptr + row * N, j, M, window)
    tl.store(counts_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(selected.to(tl.int32), 0))


@triton.jit(do_not_specialize=["N", "M", "window"])
def list_kernel(expiry_ptr, counts_ptr, keys_ptr, starts_ptr, N, M, window, BLOCK: tl.constexpr):
    """List the keys that any query selects, by position: keys [rows, M]; and where each block's start: starts [rows,
    blocks + 1], the last their number."""
    row = tl.program_id(1).to(tl.int64)
    block, blocks = tl.program_id(0), tl.num_programs(0)
    j = block * BLOCK + tl.arange(0, BLOCK)
    selected = _selected(expiry_ptr + row * N, j, M, window)
    start = before(counts_ptr + row * blocks, block, BLOCK)
    stop = _append(keys_ptr + row * M, start, j, selected)
    starts_ptr += row * (blocks + 1) + block
    tl.store(starts_ptr, start)
    if block == blocks - 1:
        tl.store(starts_ptr + 1, stop)


@triton.jit(do_not_specialize=["N", "M", "window", "parents", "blocks"])
def alive_kernel(
    expiry_ptr, keys_ptr, starts_ptr, parent_ptr, parent_count_ptr, list_ptr, count_ptr, N, M, window, parents, blocks,
    CAP, SIZE: tl.constexpr, PARENT_SIZE: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Keys selected both before and at query node * SIZE, by position: list [rows, nodes, CAP], count [rows, nodes]."""
    node = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = row * tl.num_programs(0) + node
    begin = node * SIZE
    list_ptr += slot * CAP
    count = _lasting(
        expiry_ptr + row * N, keys_ptr, starts_ptr, parent_ptr, parent_count_ptr, list_ptr, list_ptr, row, begin,
        begin + 1, M, window, parents, blocks, CAP, False, True, PARENT_SIZE, BLOCK, STRIDE,
    )  # fmt: skip
    tl.store(count_ptr + slot, count)


@triton.jit
def _columns(u_ptr, sat_end_ptr, j, keep):
    """What the consumers ask of a key beside its expiry."""
    return tl.load(u_ptr + j, mask=keep, other=0.0), tl.load(sat_end_ptr + j, mask=keep, other=0)


@triton.jit
def _enter(lists, slot, j, columns, expiry, keep):
    """Write the kept keys to their places of the list, and beside them what the consumers ask of a key, so that they
    need not gather it, once per tile."""
    list_ptr, list_u_ptr, list_expiry_ptr, list_sat_end_ptr = lists
    u, sat_end = columns
    tl.store(list_ptr + slot, j, mask=keep)
    tl.store(list_u_ptr + slot, u, mask=keep)
    tl.store(list_expiry_ptr + slot, expiry, mask=keep)
    tl.store(list_sat_end_ptr + slot, sat_end, mask=keep)


@triton.jit(do_not_specialize=["N", "M", "window", "parents", "blocks"])
def segments_kernel(
    u_ptr, expiry_ptr, sat_end_ptr, keys_ptr, starts_ptr, parent_ptr, parent_count_ptr, stay_ptr, evicted_ptr, list_ptr,
    list_u_ptr, list_expiry_ptr, list_sat_end_ptr, bounds_ptr, start_ptr, stop_ptr, late_stop_ptr, N, M, window,
    parents, blocks, STAY_CAP, CAP, SEGMENT: tl.constexpr, PARENT_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    READ: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Lay out the list of one segment.

    bounds [rows, segments, 5]: ends of the parts. start [rows, N]: first entry of part 1 still alive at a query; stop,
    late_stop [rows, N]: one past the last entry of parts 4 and 5 born by a query. Scratch: stay [rows, segments,
    STAY_CAP], the keys of parts 2 and 3 by position; evicted [rows, N].
    """
    # The last segments look at most keys where there is no parent: they start first.
    segment = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = row * tl.num_programs(0) + segment
    u_ptr += row * N
    expiry_ptr += row * N
    sat_end_ptr += row * N
    evicted_ptr += row * N
    at_list = slot * CAP
    lists = list_ptr + at_list, list_u_ptr + at_list, list_expiry_ptr + at_list, list_sat_end_ptr + at_list
    stay_ptr += slot * STAY_CAP
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, N)
    at = tl.arange(0, BLOCK)
    # By query, the key alive at the segment's start that it drops, or -1.
    for i in range(begin, end, BLOCK):
        tl.store(evicted_ptr + i + at, tl.full([BLOCK], -1, tl.int32), mask=i + at < end)
    tl.debug_barrier()
    stays = _lasting(
        expiry_ptr, keys_ptr, starts_ptr, parent_ptr, parent_count_ptr, stay_ptr, evicted_ptr, row, begin, end, M,
        window, parents, blocks, STAY_CAP, True, PARENT_SIZE > 0, PARENT_SIZE, READ, STRIDE,
    )  # fmt: skip
    tl.debug_barrier()

    # In what follows all loads come before the scans, which would wait for them one after the other.
    dropped = begin * 0
    outlive = begin * 0  # of the keys born in the segment
    for i in range(begin, end, BLOCK):
        query = i + at
        inside = query < end
        j = tl.load(evicted_ptr + query, mask=inside, other=-1)
        born = tl.load(expiry_ptr + query - window, mask=inside & (query >= window), other=0)
        keep = j >= 0
        columns = _columns(u_ptr, sat_end_ptr, j, keep)
        outlive += tl.sum((born >= end).to(tl.int32), 0)
        kept = keep.to(tl.int32)
        upto = dropped + tl.cumsum(kept, 0)
        tl.store(start_ptr + row * N + query, upto, mask=inside)
        _enter(lists, upto - kept, j, columns, query, keep)
        dropped += tl.sum(kept, 0)

    saturated = begin * 0
    for i in range(0, stays, BLOCK):
        inside = i + at < stays
        j = tl.load(stay_ptr + i + at, mask=inside, other=0)
        whole = tl.load(sat_end_ptr + j, mask=inside, other=0) >= end
        saturated += tl.sum((inside & whole).to(tl.int32), 0)
    gated_slot = dropped
    saturated_slot = dropped + stays - saturated
    for i in range(0, stays, BLOCK):
        inside = i + at < stays
        j = tl.load(stay_ptr + i + at, mask=inside, other=0)
        expiry = tl.load(expiry_ptr + j, mask=inside, other=0)
        u, sat_end = _columns(u_ptr, sat_end_ptr, j, inside)
        whole = (inside & (sat_end >= end)).to(tl.int32)
        before = tl.cumsum(whole, 0) - whole
        place = tl.where(whole == 1, saturated_slot + before, gated_slot + at - before)
        _enter(lists, place, j, (u, sat_end), expiry, inside)
        saturated_slot += tl.sum(whole, 0)
        gated_slot += BLOCK - tl.sum(whole, 0)

    born_slot = dropped + stays
    late_slot = born_slot + outlive
    bounds_ptr += slot * 5
    tl.store(bounds_ptr, dropped)
    tl.store(bounds_ptr + 1, dropped + stays - saturated)
    tl.store(bounds_ptr + 2, born_slot)
    tl.store(bounds_ptr + 3, late_slot)
    for i in range(begin, end, BLOCK):
        query = i + at
        inside = query < end
        j = query - window
        expiry = tl.load(expiry_ptr + j, mask=inside & (j >= 0), other=0)
        columns = _columns(u_ptr, sat_end_ptr, j, inside & (j >= 0))
        late = (expiry > query) & (expiry < end)
        outlives = expiry >= end
        counts = outlives.to(tl.int32) + (late.to(tl.int32) << 16)
        upto = tl.cumsum(counts, 0)
        born_upto = born_slot + (upto & 0xFFFF)
        late_upto = late_slot + (upto >> 16)
        tl.store(stop_ptr + row * N + query, born_upto, mask=inside)
        tl.store(late_stop_ptr + row * N + query, late_upto, mask=inside)
        _enter(lists, tl.where(late, late_upto, born_upto) - 1, j, columns, expiry, late | outlives)
        total = tl.sum(counts, 0)
        born_slot += total & 0xFFFF
        late_slot += total >> 16
    tl.store(bounds_ptr + 4, late_slot)


STRIDE = 1024  # keys of a block of those that are listed
READ = 2048  # keys that are looked at at once where there are many
FANOUT = 16  # nodes per parent: each level reads its parents' keys and those born within one parent


def levels(segment: int, n: int) -> list[int]:
    """Node sizes, coarsest first, of the tree whose leaves are the segments of a row of length n."""
    sizes = [segment]
    while sizes[-1] * FANOUT < n:
        # The top level gets no more nodes than FANOUT: what is left is divided between fewer leaves.
        sizes.append(sizes[-1] * min(FANOUT, next_pow2(max(2, -(-n // (FANOUT * sizes[-1]))))))
    return sizes[::-1]


def _default(problem, device):
    # Short segments make more programs of short rows, and more partials of long ones for dkv to add up.
    segment = 512 if problem.k <= 512 and problem.n <= 16384 else 1024
    return Config(SEGMENT=segment, BLOCK=segment, num_warps=8192 // segment, registers=64)


def _check(config, problem, device):
    if config["BLOCK"] < 32 * config["num_warps"]:
        return "BLOCK leaves threads without a key"
    return None


def _cost(config, problem):
    rows_per_key = (min(problem.k, problem.n) + config["SEGMENT"]) / config["SEGMENT"]
    keys = problem.rows * problem.n
    visits = keys * (2 * rows_per_key + FANOUT)
    launches = len(levels(config["SEGMENT"], problem.n))
    launches += 2 * (launches > 1)
    return Cost(flops=8.0 * visits, bytes=keys * (20.0 + 12.0 * rows_per_key), launches=launches)


TEMPLATE = Template(
    name="schedule",
    fields=frozenset({"dtype", "d", "g", "gate", "k", "w", "n", "rows"}),
    space=(
        Param("SEGMENT", Pow2(256, 4096)),
        Param("BLOCK", Pow2(256, 4096)),
        Param("num_warps", Choice((4, 8, 16))),
        Param("registers", Choice((64, 128))),  # a thread of a segment's, at most: it waits for loads in turn
    ),
    default=_default,
    check=_check,
    cost=_cost,
    # Its time is that of its consumers too, so a change of theirs outdates it.
    sources=(__file__, *(str(Path(__file__).with_name(f"{name}.py")) for name in ("forward", "dq", "dkv", "tiles"))),
)
