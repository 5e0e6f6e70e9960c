"""Threshold: tau, expiry and the gate intervals of every key, for all prefixes of a row of scores.

The scores are sorted once. ``F_t(x) = sum_{j <= t} clip(u_j - x, 0, 1)`` is piecewise linear in x with a breakpoint at
``u_j`` (slope +1) and one at ``u_j - 1`` (slope -1): the events, in one merged descending order. As tau never
decreases with t (design fact 1), the first event at which ``F_t >= k`` only ever moves towards larger values: a walk
over t moves one pointer over the events, O(N) in all. The walk is cut twice: a coarse walk in strides of COARSE
keys leaves its state at every boundary, finer walks then run from all boundaries in parallel. So the work is
O(N log N) for any scores, ties and ramps included.

All sums are integers (scores in fixed point, the largest scale that cannot overflow), hence exact, associative and
independent of the config. Scores are treated as ``clamp(u, -2^20, 2^20)``; NaN gives an undefined result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .base import Choice, Config, Cost, Param, Pow2, Template, next_pow2


@triton.jit
def _fixed_point(us_ptr, M, LOG_EVENTS: tl.constexpr):
    """The row's fixed-point unit 1.0 (int64): as large as sums over 2M events allow."""
    top = tl.maximum(tl.abs(tl.load(us_ptr)), tl.abs(tl.load(us_ptr + M - 1)))
    top = tl.maximum(tl.minimum(top, 1048576.0), 1.0)
    shift = 60 - LOG_EVENTS - tl.ceil(tl.log2(top + 1.0)).to(tl.int32)
    return tl.full([], 1, tl.int64) << tl.minimum(shift, 40)


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
def events_kernel(
    us_ptr, order_ptr, ev_q_ptr, ev_t_ptr, rank_t_ptr, key_q_ptr, key_ptr, M, LOG: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Merge the sorted scores with themselves minus one.

    Writes the event list (value; 2 * key + is_minus), and by key: value, rank, first event of the value's group and of
    the group of the value minus one (the starts of groups are what the walk's pointer is compared with).
    """
    row = tl.program_id(1).to(tl.int64)
    us_ptr += row * M
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < M
    one = _fixed_point(us_ptr, M, LOG)
    q = _quantise(tl.load(us_ptr + i, mask=live, other=0.0), one)
    t = tl.load(order_ptr + row * M + i, mask=live, other=0).to(tl.int32)
    above_up = _count_above(us_ptr, M, q + one, one, LOG)
    from_up = _count_above(us_ptr, M, q + one - 1, one, LOG)
    above = _count_above(us_ptr, M, q, one, LOG)
    above_down = _count_above(us_ptr, M, q - one, one, LOG)
    plus_group = above_up + above
    minus_group = above + above_down
    plus_at = plus_group + (from_up - above_up) + (i - above)
    minus_at = minus_group + (i - above)
    base = row * 2 * M
    tl.store(ev_q_ptr + base + plus_at, q, mask=live)
    tl.store(ev_q_ptr + base + minus_at, q - one, mask=live)
    tl.store(ev_t_ptr + base + plus_at, 2 * t, mask=live)
    tl.store(ev_t_ptr + base + minus_at, 2 * t + 1, mask=live)
    tl.store(rank_t_ptr + row * M + i, 2 * t, mask=live)
    tl.store(key_q_ptr + row * M + t, q, mask=live)
    tl.store(key_ptr + row * 3 * M + t, i, mask=live)
    tl.store(key_ptr + row * 3 * M + M + t, plus_group, mask=live)
    tl.store(key_ptr + row * 3 * M + 2 * M + t, minus_group, mask=live)


@triton.jit
def _insert(r, count, total, equal, value, key_ptr, key_q_ptr, t0, tend, M, one, STEP: tl.constexpr, TAU: tl.constexpr):
    """Add keys [t0, tend) to the sums over the events above the pointer."""
    t = t0 + tl.arange(0, STEP)
    live = t < tend
    if TAU:
        q = tl.load(key_q_ptr + t, mask=live, other=0)
        plus = live & (tl.load(key_ptr + M + t, mask=live, other=0) < r)
        minus_group = tl.load(key_ptr + 2 * M + t, mask=live, other=0)
        minus = live & (minus_group < r)
        count += tl.sum(plus.to(tl.int64), 0) - tl.sum(minus.to(tl.int64), 0)
        total += tl.sum(tl.where(plus, q, 0), 0) - tl.sum(tl.where(minus, q - one, 0), 0)
        equal += tl.sum((live & (minus_group == r) & (q - one == value)).to(tl.int64), 0)
    else:
        count += tl.sum((live & (tl.load(key_ptr + t, mask=live, other=0) < r)).to(tl.int64), 0)
    return count, total, equal


@triton.jit
def _advance(r, count, total, equal, value, ev_q_ptr, ev_t_ptr, tend, goal, WINDOW: tl.constexpr, TAU: tl.constexpr):
    """Move the pointer to the first event at which the function of the keys before ``tend`` reaches ``goal``."""
    at = tl.arange(0, WINDOW)
    moving = r > 0
    while moving:
        low = r - WINDOW
        inside = low + at >= 0
        code = tl.load(ev_t_ptr + low + at, mask=inside, other=0)
        active = inside & ((code >> 1) < tend)
        if TAU:
            q = tl.load(ev_q_ptr + low + at, mask=inside, other=0)
            sign = tl.where(active, 1 - 2 * (code & 1), 0).to(tl.int64)
            weight = sign * q
            below = total - tl.cumsum(weight, 0, reverse=True)
            reached = inside & (below - (count - tl.cumsum(sign, 0, reverse=True)) * q >= goal)
        else:
            sign = active.to(tl.int64)
            reached = inside & (count - tl.cumsum(sign, 0, reverse=True) >= goal)
        first = WINDOW - tl.sum(reached.to(tl.int32), 0)
        passed = at >= first
        count -= tl.sum(tl.where(passed, sign, 0), 0)
        if TAU:
            total -= tl.sum(tl.where(passed, weight, 0), 0)
            if first < WINDOW:
                new_value = tl.sum(tl.where(at == first, q, 0), 0)
                found = tl.sum((passed & active & ((code & 1) == 1) & (q == new_value)).to(tl.int64), 0)
                equal = found + tl.where(new_value == value, equal, 0)
                value = new_value
        r = low + first
        moving = (first == 0) & (r > 0)
    return r, count, total, equal, value


@triton.jit
def _store_state(ptr, r, count, total, equal):
    tl.store(ptr, r.to(tl.int64))
    tl.store(ptr + 1, count)
    tl.store(ptr + 2, total)
    tl.store(ptr + 3, equal)


@triton.jit
def _tabulate(
    ev_q_ptr, ev_t_ptr, table_ptr, last, blocks, SPAN: tl.constexpr, COARSE: tl.constexpr, WINDOW: tl.constexpr,
    TAU: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    stop = tl.minimum((block + 1) * SPAN, last)
    for i in range(block * SPAN, stop, WINDOW):
        at = i + tl.arange(0, WINDOW)
        inside = at < stop
        code = tl.load(ev_t_ptr + at, mask=inside, other=0)
        cell = table_ptr + ((code >> 1) // COARSE * blocks + block) * 2
        sign = (1 - 2 * (code & 1)).to(tl.int64)
        tl.atomic_add(cell, sign, mask=inside, sem="relaxed")  # integers: the order of the additions does not matter
        if TAU:
            q = tl.load(ev_q_ptr + at, mask=inside, other=0)
            tl.atomic_add(cell + 1, sign * q, mask=inside, sem="relaxed")


@triton.jit
def table_kernel(
    ev_q_ptr, ev_t_ptr, rank_t_ptr, table_ptr, M, blocks, chunks, SPAN: tl.constexpr, COARSE: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Sums of signs and of signed values by (COARSE keys, SPAN events), for tau (axis 1: 0) and kappa (1), into the
    zeros of table [rows, 2, chunks, blocks, 2]."""
    row = tl.program_id(2).to(tl.int64)
    table_ptr += (row * 2 + tl.program_id(1)) * chunks * blocks * 2
    if tl.program_id(1) == 0:
        _tabulate(ev_q_ptr + row * 2 * M, ev_t_ptr + row * 2 * M, table_ptr, 2 * M, blocks, SPAN, COARSE, WINDOW, True)
    else:
        _tabulate(ev_q_ptr, rank_t_ptr + row * M, table_ptr, M, blocks, SPAN, COARSE, WINDOW, False)


@triton.jit
def _start(
    table_ptr, state_ptr, us_ptr, ev_q_ptr, ev_t_ptr, blocks, M, K, LOG: tl.constexpr, BLOCKS: tl.constexpr,
    SPAN: tl.constexpr, COARSE: tl.constexpr, WINDOW: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    counts = tl.zeros([BLOCKS], tl.int64)
    totals = tl.zeros([BLOCKS], tl.int64)
    for earlier in range(0, chunk):
        cell = table_ptr + (earlier * blocks + b) * 2
        counts += tl.load(cell, mask=b < blocks, other=0)
        totals += tl.load(cell + 1, mask=b < blocks, other=0)
    counts = tl.cumsum(counts, 0)
    totals = tl.cumsum(totals, 0)
    last = M
    goal = K.to(tl.int64)
    if TAU:
        last = 2 * M
        goal = goal * _fixed_point(us_ptr, M, LOG)
    edge = (b + 1) * SPAN
    reached = counts >= goal
    if TAU:
        q = tl.load(ev_q_ptr + edge, mask=edge < last, other=0)
        reached = totals - counts * q >= goal
    reached = reached & (edge < last)
    # The first edge at which the goal is reached, else the end of all events.
    found = tl.minimum(tl.min(tl.where(reached, b, BLOCKS), 0), blocks - 1)
    r = tl.minimum((found + 1) * SPAN, last)
    count = tl.sum(tl.where(b == found, counts, 0), 0)
    total = tl.sum(tl.where(b == found, totals, 0), 0)
    equal = tl.full([], 0, tl.int64)
    value = tl.full([], -(1 << 62), tl.int64)
    tend = chunk * COARSE
    if TAU:
        value = tl.load(ev_q_ptr + r, mask=r < last, other=-(1 << 62))
        at = r + tl.arange(0, WINDOW)
        more = r < last
        while more:
            same = (at < last) & (tl.load(ev_q_ptr + at, mask=at < last, other=0) == value)
            code = tl.load(ev_t_ptr + at, mask=same, other=0)
            equal += tl.sum((same & ((code >> 1) < tend) & ((code & 1) == 1)).to(tl.int64), 0)
            more = tl.sum(same.to(tl.int32), 0) == WINDOW
            at += WINDOW
    r, count, total, equal, value = _advance(r, count, total, equal, value, ev_q_ptr, ev_t_ptr, tend, goal, WINDOW, TAU)
    _store_state(state_ptr + chunk * 4, r, count, total, equal)


@triton.jit(do_not_specialize=["K"])
def start_kernel(
    table_ptr, state_ptr, us_ptr, ev_q_ptr, ev_t_ptr, rank_t_ptr, blocks, M, K, LOG: tl.constexpr,
    BLOCKS: tl.constexpr, SPAN: tl.constexpr, COARSE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The walk's state at every COARSE-th key, from the table: state [rows, 2, chunks, 4]."""
    row = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(0)
    table_ptr += (row * 2 + tl.program_id(1)) * chunks * blocks * 2
    state_ptr += (row * 2 + tl.program_id(1)) * chunks * 4
    us_ptr += row * M
    if tl.program_id(1) == 0:
        _start(
            table_ptr, state_ptr, us_ptr, ev_q_ptr + row * 2 * M, ev_t_ptr + row * 2 * M, blocks, M, K, LOG, BLOCKS,
            SPAN, COARSE, WINDOW, True,
        )  # fmt: skip
    else:
        _start(
            table_ptr, state_ptr, us_ptr, ev_q_ptr, rank_t_ptr + row * M, blocks, M, K, LOG, BLOCKS, SPAN, COARSE,
            WINDOW, False,
        )  # fmt: skip


@triton.jit
def _walk(
    state_in_ptr, state_out_ptr, us_ptr, ev_q_ptr, ev_t_ptr, key_ptr, key_q_ptr, pointer_ptr, tau_ptr, interior_ptr,
    chunk, M, K, LOG: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    one = _fixed_point(us_ptr, M, LOG)
    last = M
    goal = K.to(tl.int64)
    if TAU:
        last = 2 * M
        goal = goal * one
    r = tl.load(state_in_ptr + chunk * 4).to(tl.int32)
    count = tl.load(state_in_ptr + chunk * 4 + 1)
    total = tl.load(state_in_ptr + chunk * 4 + 2)
    equal = tl.load(state_in_ptr + chunk * 4 + 3)
    value = tl.full([], -(1 << 62), tl.int64)
    if TAU:
        value = tl.load(ev_q_ptr + r, mask=r < last, other=-(1 << 62))
    t0 = chunk * CHUNK
    stop = tl.minimum(t0 + CHUNK, M)
    while t0 < stop:
        if STEP > 1:
            _store_state(state_out_ptr + (t0 // STEP) * 4, r, count, total, equal)
        tend = tl.minimum(t0 + STEP, stop)
        count, total, equal = _insert(r, count, total, equal, value, key_ptr, key_q_ptr, t0, tend, M, one, STEP, TAU)
        r, count, total, equal, value = _advance(
            r, count, total, equal, value, ev_q_ptr, ev_t_ptr, tend, goal, WINDOW, TAU
        )
        if STEP == 1:
            free = tend <= K  # no more candidates than the budget: all selected, no threshold
            if TAU:
                exact = (total - count * value == goal) & (r < last)
                tau = (total - goal).to(tl.float64) / (tl.maximum(count, 1).to(tl.float64) * one.to(tl.float64))
                tl.store(tau_ptr + t0, tl.where(free, float("-inf"), tau.to(tl.float32)))
                inner = count - tl.where(exact, equal, 0)
                tl.store(interior_ptr + t0, tl.where(free, 0, inner).to(tl.int32))
                tl.store(pointer_ptr + t0, tl.where(free, 2 * last + 1, 2 * r + exact.to(tl.int32)))
            else:
                tl.store(pointer_ptr + t0, tl.where(free, last, r))
        t0 += STEP


@triton.jit(do_not_specialize=["K", "N", "shift"])
def walk_kernel(
    state_in_ptr, state_out_ptr, us_ptr, ev_q_ptr, ev_t_ptr, rank_t_ptr, key_ptr, key_q_ptr, pointer_ptr, tau_ptr,
    interior_ptr, chunks, steps, M, N, shift, K, LOG: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """One level of the walk: from each state in (every CHUNK keys) to states out (every STEP keys), or, at STEP 1, to
    the results. Program axis 1: tau (0) or kappa (1). ``shift`` is the window: prefix t is query t + shift's.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    us_ptr += row * M
    key_ptr += row * 3 * M
    key_q_ptr += row * M
    tau_ptr += row * N + shift
    interior_ptr += row * N + shift
    if tl.program_id(1) == 0:
        _walk(
            state_in_ptr + row * 8 * chunks, state_out_ptr + row * 8 * steps, us_ptr, ev_q_ptr + row * 2 * M,
            ev_t_ptr + row * 2 * M, key_ptr, key_q_ptr, pointer_ptr + row * 2 * M, tau_ptr, interior_ptr,
            chunk, M, K, LOG, CHUNK, STEP, WINDOW, True,
        )  # fmt: skip
    else:
        _walk(
            state_in_ptr + (row * 2 + 1) * 4 * chunks, state_out_ptr + (row * 2 + 1) * 4 * steps, us_ptr, ev_q_ptr,
            rank_t_ptr + row * M, key_ptr, key_q_ptr, pointer_ptr + (row * 2 + 1) * M, tau_ptr, interior_ptr,
            chunk, M, K, LOG, CHUNK, STEP, WINDOW, False,
        )  # fmt: skip


@triton.jit
def _first_at_most(ptr, lo, M, x, LOG: tl.constexpr):
    """First t >= lo with ptr[t] <= x, for a non-increasing array; M where there is none."""
    hi = tl.zeros_like(lo) + M
    for _ in range(LOG):
        open_ = lo < hi
        mid = (lo + hi) // 2
        hit = tl.load(ptr + mid, mask=open_, other=0) <= x
        hi = tl.where(open_ & hit, mid, hi)
        lo = tl.where(open_ & ~hit, mid + 1, lo)
    return lo


@triton.jit(do_not_specialize=["N", "shift"])
def intervals_kernel(
    pointer_ptr, key_ptr, expiry_ptr, sat_end_ptr, sup_end_ptr, M, N, shift, LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """By key: the queries at which it is dropped, stops being saturated and leaves the support (N: never)."""
    row = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < N
    candidate = j < M
    key_ptr += row * 3 * M
    rank = tl.load(key_ptr + j, mask=candidate, other=0)
    plus_group = tl.load(key_ptr + M + j, mask=candidate, other=0)
    minus_group = tl.load(key_ptr + 2 * M + j, mask=candidate, other=0)
    start = tl.where(candidate, j, M)
    tau_at = pointer_ptr + row * 2 * M
    expiry = _first_at_most(tau_at + M, start, M, rank, LOG)
    sat_end = _first_at_most(tau_at, start, M, 2 * minus_group, LOG)
    sup_end = _first_at_most(tau_at, start, M, 2 * plus_group + 1, LOG)
    tl.store(expiry_ptr + row * N + j, tl.where(expiry < M, expiry + shift, N), mask=inside)
    tl.store(sat_end_ptr + row * N + j, tl.where(sat_end < M, sat_end + shift, N), mask=inside)
    tl.store(sup_end_ptr + row * N + j, tl.where(sup_end < M, sup_end + shift, N), mask=inside)


def cuts(m: int, coarse: int) -> tuple[int, int, int]:
    """Keys per chunk, events per block and number of blocks of the table: at most 256 x 512 cells."""
    chunk = max(coarse, next_pow2(-(-m // 256)))
    span = max(1024, next_pow2(-(-2 * m // 512)))
    return chunk, span, -(-2 * m // span)


def _default(problem, device):
    return Config(COARSE=1024, FINE=32, coarse_window=1024, fine_window=128, coarse_warps=4, fine_warps=1)


def _check(config, problem, device):
    if config["COARSE"] < 2 * config["FINE"]:
        return "COARSE must be at least twice FINE"
    for walk in ("coarse", "fine"):
        if config[f"{walk}_window"] < 32 * config[f"{walk}_warps"]:
            return f"{walk}_window leaves threads of a {walk} walk without an event"
    return None


def _cost(config, problem):
    keys = problem.rows * problem.n
    logn = max(1, problem.n.bit_length())
    # sort passes over (4 + 8) B, events written and read at two levels, binary searches from L2
    return Cost(flops=keys * 40.0 * logn, bytes=keys * (12.0 * 8 + 36.0 * 3 + 24.0), launches=10)


TEMPLATE = Template(
    name="threshold",
    fields=frozenset({"k", "w", "n", "rows"}),
    space=(
        Param("COARSE", Pow2(256, 4096)),
        Param("FINE", Pow2(8, 64)),
        Param("coarse_window", Pow2(256, 2048)),
        Param("fine_window", Pow2(64, 256)),
        Param("coarse_warps", Choice((1, 2, 4, 8))),
        Param("fine_warps", Choice((1, 2, 4))),
    ),
    default=_default,
    check=_check,
    cost=_cost,
    sources=(__file__,),
)
