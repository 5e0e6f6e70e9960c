"""Threshold: tau, expiry and the gate intervals of every key, for all prefixes of a row of scores.

The scores are sorted once. ``F_t(x) = sum_{j <= t} clip(u_j - x, 0, 1)`` is piecewise linear in x with a breakpoint at
``u_j`` (slope +1) and one at ``u_j - 1`` (slope -1): the events, in one merged descending order. F only grows with t
(design fact 1), so every event value x has one crossing time, the first t with ``F_t(x) >= k`` (for ``u_j``: the key
leaves the support) or ``> k`` (for ``u_j - 1``: it stops being saturated). An event counts from its key's birth until
its crossing; sums of what counts, by time, give tau and the number of interior keys of every query. The same for
ranks: key j is dropped once k better ones are born.

Time is cut into stretches of CHUNK keys that are solved in parallel (``walk``): a table of sums by (stretch, block of
events) tells each which events can cross in it, and F at their edge. Every event crosses once, so all stretches take
up O((1 + SPAN / CHUNK) N) events, whatever the scores, and add at most CHUNK new keys to each.

All sums are integers (scores in fixed point, the largest scale that cannot overflow), hence exact, associative and
independent of the config. Scores are treated as ``clamp(u, -2^20, 2^20)``; NaN gives an undefined result.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import triton
import triton.language as tl

from .base import Choice, Config, Cost, Param, Pow2, Template, next_pow2
from .walk import fixed_point


@triton.jit
def _quantise(u, one):
    return (tl.maximum(tl.minimum(u, 1048576.0), -1048576.0).to(tl.float64) * one.to(tl.float64)).to(tl.int64)


@triton.jit
def _count_above(us_ptr, M, x, one, LOG: tl.constexpr):
    """How many of the row's sorted scores lie above x (fixed point)."""
    lo = tl.zeros_like(x).to(tl.int32)
    hi = lo + M
    for _ in range(LOG):
        mid = (lo + hi) // 2
        open_ = lo < hi
        above = _quantise(tl.load(us_ptr + mid, mask=open_, other=0.0), one) > x
        lo = tl.where(open_ & above, mid + 1, lo)
        hi = tl.where(open_ & ~above, mid, hi)
    return lo


@triton.jit
def _add(cell, blocks, block, sign, q, mask):
    """Add events to their cells of the table. Integers: the order of the additions does not matter."""
    tl.atomic_add(cell + block, sign, mask=mask, sem="relaxed")
    tl.atomic_add(cell + blocks + block, sign * q, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["M", "K", "stretches", "blocks", "fine", "few"])
def events_kernel(
    us_ptr, order_ptr, ev_q_ptr, ev_t_ptr, key_q_ptr, key_ptr, table_ptr, M, K, stretches, blocks, fine, few,
    LOG: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the sorted scores with themselves minus one.

    In, [rows, M]: us float32, falling; order, their keys. Out: the events [rows, 2M], value int64 and 2 * key +
    is_minus int32; by key: value int64 [rows, M] and int32 [rows, 3, M] the places of its two events and its rank.
    Adds to the zeros of table int64 [rows, 1 + stretches, 3, blocks], by the time of the key (first of all those
    before query K) and the block of SPAN events: signs, signed values; and the number of keys by SPAN / 2 ranks.
    """
    row = tl.program_id(1).to(tl.int64)
    us_ptr += row * M
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < M
    one = fixed_point(us_ptr, M, LOG)
    q = _quantise(tl.load(us_ptr + i, mask=live, other=0.0), one)
    t = tl.load(order_ptr + row * M + i, mask=live, other=0).to(tl.int32)
    # Where values are equal, plus comes before minus: any order would do, F is continuous.
    plus_at = i + _count_above(us_ptr, M, q + one, one, LOG)
    minus_at = i + _count_above(us_ptr, M, q - one - 1, one, LOG)
    base = row * 2 * M
    tl.store(ev_q_ptr + base + plus_at, q, mask=live)
    tl.store(ev_q_ptr + base + minus_at, q - one, mask=live)
    tl.store(ev_t_ptr + base + plus_at, 2 * t, mask=live)
    tl.store(ev_t_ptr + base + minus_at, 2 * t + 1, mask=live)
    tl.store(key_q_ptr + row * M + t, q, mask=live)
    tl.store(key_ptr + row * 3 * M + t, plus_at, mask=live)
    tl.store(key_ptr + row * 3 * M + M + t, minus_at, mask=live)
    tl.store(key_ptr + row * 3 * M + 2 * M + t, i, mask=live)
    since = t - K - few * fine
    time = tl.where(since < 0, (t - K) // fine, few + since // CHUNK) + 1
    time = tl.where(t < K, 0, time)
    cell = table_ptr + (row * (1 + stretches) + time) * 3 * blocks
    sign = tl.full([BLOCK], 1, tl.int64)
    _add(cell, blocks, plus_at // SPAN, sign, q, live)
    _add(cell, blocks, minus_at // SPAN, -sign, q - one, live)
    tl.atomic_add(cell + 2 * blocks + i // (SPAN // 2), sign, mask=live, sem="relaxed")


@triton.jit(do_not_specialize=["times", "width"])
def prefix_kernel(table_ptr, times, width, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    """Running sums over time, in place: table int64 [rows, times, width]."""
    table_ptr += tl.program_id(1).to(tl.int64) * times * width
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    carry = tl.zeros([BLOCK], tl.int64)
    for start in range(0, times, TIMES):
        time = start + tl.arange(0, TIMES)[:, None]
        inside = (time < times) & (column < width)
        cell = table_ptr + time * width + column
        x = tl.load(cell, mask=inside, other=0)
        tl.store(cell, tl.cumsum(x, 0) + carry[None, :], mask=inside)
        carry += tl.sum(x, 0)


EARLIER = 16  # stretches that a program of the walk adds up at once, where the table holds no running sums
FEW = 64  # up to so many stretches running sums are not worth a kernel of their own
REGISTERS = 128  # a thread of the walk: it waits for memory most of the time, so 16 warps an SM matter more
PROGRAMS = 6144  # of one launch of the walk, each with scratch of its own
MERGED = 32  # more sorted chunks than this cost more than torch.sort


FINE = 128  # keys of the first stretches


class Cuts(NamedTuple):
    """How a row is cut: ``few`` stretches of ``fine`` keys, then such of ``chunk``; blocks of ``span`` events."""

    chunk: int
    fine: int
    few: int
    stretches: int
    span: int
    blocks: int


def cuts(m: int, k: int, chunk: int) -> Cuts:
    """At most 4096 + 512 stretches and 1024 blocks.

    Of scores without a trend the t-th is among the best k with a probability of k / t: so stretches that are as long
    as ``chunk / fine`` times k is far get equally much to do.
    """
    chunk = max(chunk, next_pow2(-(-(m - k) // 4096)))
    fine = min(chunk, FINE)
    while (few := -(-min((chunk // fine - 1) * k, m - k) // fine)) > 512:
        fine *= 2
    stretches = few + max(0, -(-(m - k - few * fine) // chunk))
    log = (2 * m - 1).bit_length()
    span = 1 << max(1, log - min(10, max(0, log - 2) // 2))
    return Cuts(chunk, fine, few, stretches, span, -(-2 * m // span))


def ring(config: Config) -> int:
    """Slots of a program's ring buffer: less than a window is left when a scan's worth is added."""
    return next_pow2(config["WINDOW"] + config["SCAN"])


def _default(problem, device):
    n, m = problem.n, problem.n - problem.w
    sort = next((size for most, size in ((1024, 1024), (2048, 2048), (8192, 1024), (16384, 2048)) if m <= most), 4096)
    chunk = 128 if n <= 8192 else 256 if n <= 32768 else 512 if n <= 262144 else 1024
    return Config(
        SORT=0 if m > 32768 else sort,
        CHUNK=chunk,
        WINDOW=512 if chunk <= 256 else 256,
        SCAN=1024,
        sort_warps=4 if m > 32768 else 16 if sort > 2048 else 8,
        walk_warps=4,
    )


def _check(config, problem, device):
    m = problem.n - problem.w
    sort, warps = config["SORT"], config["walk_warps"]
    if sort and sort * MERGED < m:
        return "too many chunks to merge"
    if sort and not 1 <= sort // (32 * config["sort_warps"]) <= 16:
        return "threads of the sort hold no key or too many"
    for name, most in (("WINDOW", 4), ("SCAN", 16), ("CHUNK", 8)):
        if not 1 <= config[name] // (32 * warps) <= most:
            return f"threads of the walk hold nothing of a {name} or too much"
    return None


def _cost(config, problem):
    n, m = problem.n, problem.n - problem.w
    if m <= problem.k:
        return Cost(flops=0.0, bytes=20.0 * problem.rows * n)
    c = cuts(m, problem.k, config["CHUNK"])
    new = c.chunk * min(1.0, problem.k / n)  # keys of a stretch that matter
    window = config["WINDOW"]
    windows = -(-(c.span / 2 + 3 * new) // window)
    walk = 2 * c.stretches * (windows * window * (100 + 8 * new) + 30 * (config["SCAN"] + c.span))
    sort = m * (400.0 if config["SORT"] else 900.0)
    search = 60.0 * m * max(1, m.bit_length())
    # Read: the scores. Written and mostly read again: sorted scores and their keys, events, values and places by key,
    # the table, the results.
    data = problem.rows * (n * 24.0 + m * 2 * (8 + 24 + 20) + 48.0 * (1 + c.stretches) * c.blocks)
    launches = (3 if config["SORT"] >= m else 4 if config["SORT"] else 8) + (c.stretches > FEW)
    return Cost(flops=problem.rows * (walk + sort + search), bytes=data, launches=launches)


TEMPLATE = Template(
    name="threshold",
    fields=frozenset({"k", "w", "n", "rows"}),
    space=(
        Param("SORT", Choice((0, 1024, 2048, 4096))),  # scores per sorted chunk; 0: torch.sort
        Param("CHUNK", Pow2(64, 1024)),
        Param("WINDOW", Pow2(128, 1024)),
        Param("SCAN", Pow2(512, 4096)),
        Param("sort_warps", Choice((4, 8, 16)), when=lambda chosen: chosen["SORT"] != 0),
        Param("walk_warps", Choice((2, 4, 8))),
    ),
    default=_default,
    check=_check,
    cost=_cost,
    sources=(__file__, *(str(Path(__file__).with_name(f"{name}.py")) for name in ("sort", "walk"))),
)
