"""Schedule: per segment of SEGMENT queries, the keys that its queries select, in an order that serves every kernel.

A segment's list holds, one after the other:
  1. the keys alive at its start that are dropped inside it, by expiry;
  2. those that outlive it and are not saturated (gate 1) for all of it, by position;
  3. those that outlive it and are saturated for all of it, by position (no mask, no gate);
  4. the keys born inside it that outlive it, by position;
  5. those born and dropped inside it, by position.
A tile of queries reads a contiguous range, from the first key of part 1 that is still alive to the last of part 4 born,
and part 5 up to the last born. Parts 1 to 3 come from the keys alive at the segment's start, found level by level: a
node's alive keys are its parent's that live on, and those born since. Part 1 is sorted by scattering its keys to the
queries that drop them, at most one each.
Design fact 2 bounds each list: at most ``min(k, M) + SEGMENT`` keys.
"""

from __future__ import annotations

from pathlib import Path

import triton
import triton.language as tl

from .base import Choice, Config, Cost, Param, Pow2, Template


@triton.jit
def _append(list_ptr, count, j, keep):
    """Append the kept entries of j, in order; returns the new count."""
    kept = keep.to(tl.int32)
    tl.store(list_ptr + count + tl.cumsum(kept, 0) - kept, j, mask=keep)
    return count + tl.sum(kept, 0)


@triton.jit
def _alive(
    expiry_ptr, parent_ptr, parent_count_ptr, list_ptr, row, begin, M, window, parents, CAP, PARENT_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """List the keys selected both before and at query ``begin``, by position; returns their number. PARENT_SIZE 0: no
    parent. Every load but those of inherited keys' expiry runs one block ahead of its use."""
    at = tl.arange(0, BLOCK)
    count = begin * 0
    first = -window
    if PARENT_SIZE > 0:
        parent = begin // PARENT_SIZE
        first = parent * PARENT_SIZE - window
        parent_ptr += (row * parents + parent) * CAP
        inherited = tl.load(parent_count_ptr + row * parents + parent)
        j = tl.load(parent_ptr + at, mask=at < inherited, other=0)
        for i in range(0, inherited, BLOCK):
            ahead = i + BLOCK + at
            next_j = tl.load(parent_ptr + ahead, mask=ahead < inherited, other=0)
            inside = i + at < inherited
            keep = inside & (tl.load(expiry_ptr + j, mask=inside, other=0) > begin)
            count = _append(list_ptr, count, j, keep)
            j = next_j
    first = tl.maximum(first, 0)
    last = tl.minimum(begin - window, M)
    expiry = tl.load(expiry_ptr + first + at, mask=first + at < last, other=0)
    for i in range(first, last, BLOCK):
        ahead = i + BLOCK + at
        next_expiry = tl.load(expiry_ptr + ahead, mask=ahead < last, other=0)
        count = _append(list_ptr, count, i + at, (i + at < last) & (expiry > begin))
        expiry = next_expiry
    return count


@triton.jit(do_not_specialize=["N", "M", "window", "parents"])
def alive_kernel(
    expiry_ptr, parent_ptr, parent_count_ptr, list_ptr, count_ptr, N, M, window, parents, CAP, SIZE: tl.constexpr,
    PARENT_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys selected both before and at query node * SIZE, by position: list [rows, nodes, CAP], count [rows, nodes]."""
    node = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = row * tl.num_programs(0) + node
    count = _alive(
        expiry_ptr + row * N, parent_ptr, parent_count_ptr, list_ptr + slot * CAP, row, node * SIZE, M, window,
        parents, CAP, PARENT_SIZE, BLOCK,
    )  # fmt: skip
    tl.store(count_ptr + slot, count)


@triton.jit
def _dropped(expiry_ptr, evicted_ptr, alive_ptr, alive, begin, end, BLOCK: tl.constexpr):
    """By query of the segment, the key alive at its start that is dropped there, or -1."""
    at = tl.arange(0, BLOCK)
    for i in range(begin, end, BLOCK):
        tl.store(evicted_ptr + i + at, tl.full([BLOCK], -1, tl.int32), mask=i + at < end)
    tl.debug_barrier()
    for i in range(0, alive, BLOCK):
        inside = i + at < alive
        j = tl.load(alive_ptr + i + at, mask=inside, other=0)
        expiry = tl.load(expiry_ptr + j, mask=inside, other=0)
        tl.store(evicted_ptr + expiry, j, mask=inside & (expiry < end))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "M", "window", "parents"])
def segments_kernel(
    u_ptr, expiry_ptr, sat_end_ptr, parent_ptr, parent_count_ptr, alive_ptr, evicted_ptr, list_ptr, list_u_ptr,
    list_expiry_ptr, list_sat_end_ptr, bounds_ptr, start_ptr, stop_ptr, late_stop_ptr, N, M, window, parents, ALIVE_CAP,
    CAP, SEGMENT: tl.constexpr, PARENT_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lay out the list of one segment.

    bounds [rows, segments, 5]: ends of the parts. start [rows, N]: first entry of part 1 still alive at a query; stop,
    late_stop [rows, N]: one past the last entry of parts 4 and 5 born by a query. Scratch: alive [rows, segments,
    ALIVE_CAP], the keys alive at the segment's start; evicted [rows, N].
    """
    segment = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = row * tl.num_programs(0) + segment
    expiry_ptr += row * N
    sat_end_ptr += row * N
    evicted_ptr += row * N
    start_ptr += row * N
    stop_ptr += row * N
    late_stop_ptr += row * N
    list_ptr += slot * CAP
    alive_ptr += slot * ALIVE_CAP
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, N)
    at = tl.arange(0, BLOCK)
    alive = _alive(
        expiry_ptr, parent_ptr, parent_count_ptr, alive_ptr, row, begin, M, window, parents, ALIVE_CAP, PARENT_SIZE,
        BLOCK,
    )  # fmt: skip
    _dropped(expiry_ptr, evicted_ptr, alive_ptr, alive, begin, end, BLOCK)

    count = begin * 0
    for i in range(begin, end, BLOCK):
        query = i + at
        inside = query < end
        j = tl.load(evicted_ptr + query, mask=inside, other=-1)
        keep = j >= 0
        tl.store(start_ptr + query, count + tl.cumsum(keep.to(tl.int32), 0), mask=inside)
        count = _append(list_ptr, count, j, keep)
    tl.store(bounds_ptr + slot * 5, count)

    for saturated in tl.static_range(2):
        for i in range(0, alive, BLOCK):
            inside = i + at < alive
            j = tl.load(alive_ptr + i + at, mask=inside, other=0)
            stays = inside & (tl.load(expiry_ptr + j, mask=inside, other=0) >= end)
            whole = tl.load(sat_end_ptr + j, mask=inside, other=0) >= end
            if saturated:
                count = _append(list_ptr, count, j, stays & whole)
            else:
                count = _append(list_ptr, count, j, stays & ~whole)
        tl.store(bounds_ptr + slot * 5 + 1 + saturated, count)

    for late in tl.static_range(2):
        for i in range(begin, end, BLOCK):
            query = i + at
            inside = query < end
            j = query - window
            candidate = inside & (j >= 0)
            expiry = tl.load(expiry_ptr + j, mask=candidate, other=0)
            if late:
                keep = (expiry > query) & (expiry < end)
                tl.store(late_stop_ptr + query, count + tl.cumsum(keep.to(tl.int32), 0), mask=inside)
            else:
                keep = (expiry > query) & (expiry >= end)
                tl.store(stop_ptr + query, count + tl.cumsum(keep.to(tl.int32), 0), mask=inside)
            count = _append(list_ptr, count, j, keep)
        tl.store(bounds_ptr + slot * 5 + 3 + late, count)

    # What the consumers ask of a key lies beside it, so that they need not gather it, once per tile.
    tl.debug_barrier()
    u_ptr += row * N
    list_u_ptr += slot * CAP
    list_expiry_ptr += slot * CAP
    list_sat_end_ptr += slot * CAP
    for i in range(0, count, BLOCK):
        inside = i + at < count
        j = tl.load(list_ptr + i + at, mask=inside, other=0)
        tl.store(list_u_ptr + i + at, tl.load(u_ptr + j, mask=inside, other=0.0), mask=inside)
        tl.store(list_expiry_ptr + i + at, tl.load(expiry_ptr + j, mask=inside, other=0), mask=inside)
        tl.store(list_sat_end_ptr + i + at, tl.load(sat_end_ptr + j, mask=inside, other=0), mask=inside)


FANOUT = 16  # nodes per parent: each level reads its parents' keys and those born within one parent


def levels(segment: int, n: int) -> list[int]:
    """Node sizes, coarsest first, of the tree whose leaves are the segments of a row of length n."""
    sizes = [segment]
    while sizes[-1] * FANOUT < n:
        sizes.append(sizes[-1] * FANOUT)
    return sizes[::-1]


def _default(problem, device):
    return Config(SEGMENT=512 if problem.k <= 512 else 1024, BLOCK=2048, num_warps=8)


def _check(config, problem, device):
    if config["BLOCK"] < 32 * config["num_warps"]:
        return "BLOCK leaves threads without a key"
    return None


def _cost(config, problem):
    rows_per_key = (min(problem.k, problem.n) + config["SEGMENT"]) / config["SEGMENT"]
    keys = problem.rows * problem.n
    visits = keys * (2 * rows_per_key + FANOUT)
    launches = len(levels(config["SEGMENT"], problem.n))
    return Cost(flops=8.0 * visits, bytes=keys * (20.0 + 12.0 * rows_per_key), launches=launches)


TEMPLATE = Template(
    name="schedule",
    fields=frozenset({"dtype", "d", "g", "gate", "k", "w", "n", "rows"}),
    space=(
        Param("SEGMENT", Pow2(256, 4096)),
        Param("BLOCK", Pow2(256, 4096)),
        Param("num_warps", Choice((1, 2, 4, 8, 16))),
    ),
    default=_default,
    check=_check,
    cost=_cost,
    # Its time is that of its consumers too, so a change of theirs outdates it.
    sources=(__file__, *(str(Path(__file__).with_name(f"{name}.py")) for name in ("forward", "dq", "dkv", "tiles"))),
)
