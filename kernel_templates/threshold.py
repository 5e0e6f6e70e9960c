"""Threshold: tau, expiry and the gate intervals of every key, for all prefixes of a row of scores.

Most keys of long rows that no query can select are left out first (``filter``). The others are sorted once (``sort``).
``F_t(x) = sum_{j <= t} clip(u_j - x, 0, 1)`` is piecewise linear in x with a breakpoint at ``u_j`` (slope +1) and one
at ``u_j - 1`` (slope -1): the events, in one merged descending order. F only grows with t (design fact 1), so every
event value x has one crossing time, the first t with ``F_t(x) >= k`` (for ``u_j``: the key leaves the support) or
``> k`` (for ``u_j - 1``: it stops being saturated). An event counts from its key's birth until its crossing; sums of
what counts, by time, give tau and the number of interior keys of every query. The same for ranks: key j is dropped
once k better ones are born.

Time is cut into stretches of CHUNK keys that are solved in parallel (``walk``): a table of sums by (stretch, block of
events), made with the events (``events``), tells each which events can cross in it, and F at their edge. Every event
crosses once, so all stretches take up O((1 + SPAN / CHUNK) N) events, whatever the scores, and add at most CHUNK new
keys to each.

All sums are integers (scores in fixed point, the largest scale that cannot overflow), hence exact, associative and
independent of the config. Scores are treated as ``clamp(u, -2^20, 2^20)``; NaN gives an undefined result.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .base import Choice, Config, Cost, Param, Pow2, Template, next_pow2
from .filter import LATELY

PROGRAMS = 6144  # of one launch of the walk, each with scratch of its own
RUNS = 4  # merged by one round: more would be searched for longer than two rounds take
TIMES = 128  # whose sums a program of the events finds at once
PIECE = 4096  # events that it sorts at once
PARTS = 8  # of a stretch that windows of events may skip
SKIPPED = 512  # keys of a stretch, at least: shorter ones are walked over as fast
FINE = 128  # keys of the first stretches
FILTERED = 32768  # keys: of shorter rows leaving some out saves less than it takes
MANY = 8  # times k: likewise
BOUNDED = 1024  # keys that a program looks at at once for bounds
RECENT = 1024  # keys, at least, from one bound of what was born lately to the next
BLOCK = 1024  # keys that a program leaves out
BACK = 256  # keys that a program puts back: more would wait for longer
SPAN = 256  # events of a block; fewer up to 4096 keys, more where there would be over 512 blocks


class Cuts(NamedTuple):
    """How a row is cut: ``few`` stretches of ``fine`` keys, then such of ``chunk``; blocks of ``span`` events."""

    chunk: int
    fine: int
    few: int
    stretches: int
    span: int
    blocks: int


def filtered(m: int, k: int) -> bool:
    """Whether keys that no query selects are left out first."""
    return m >= max(FILTERED, MANY * k)


def bounds(m: int, k: int) -> int:
    """The number of prefixes of 2k << a keys, short of the row, that bound tau."""
    return (-(-m // (2 * k)) - 1).bit_length()


def recent(m: int, k: int) -> tuple[int, int]:
    """The stride of bounds from what was born lately, and their number, short of the row's end."""
    stride = max(k, RECENT)
    return stride, max(0, (m - 1) // stride - LATELY.value + 1)


def left(m: int, k: int) -> int:
    """About how many keys the filter leaves of m whose scores have no trend."""
    return min(m, k * (4 + 3 * bounds(m, k)) // 2)


def cuts(m: int, k: int, chunk: int) -> Cuts:
    """At most 4096 + 512 stretches and 512 blocks.

    Of scores without a trend the t-th is among the best k with a probability of k / t: so stretches that are as long
    as ``chunk / fine`` times k is far get equally much to do. Where keys were left out it is the same all along: fine
    stretches up to where they end, and others for what is left where there is a trend.
    """
    chunk = max(chunk, next_pow2(-(-(m - k) // 4096)))
    log = (2 * m - 1).bit_length()
    span = max(min(1 << max(1, log - max(0, log - 1) // 2), SPAN), 1 << max(0, log - 9))
    fine = min(chunk, FINE)
    if filtered(m, k):
        few = min(-(-(left(m, k) - k) // fine), 512)
    else:
        while (few := -(-min((chunk // fine - 1) * k, m - k) // fine)) > 512:
            fine *= 2
    stretches = few + max(0, -(-(m - k - few * fine) // chunk))
    return Cuts(chunk, fine, few, stretches, span, -(-2 * m // span))


def rounds(m: int, sort: int) -> list[int]:
    """The length of the runs that each round of merging reads."""
    runs = []
    while sort < m:
        runs.append(sort)
        sort *= RUNS
    return runs


def parts(chunk: int) -> int:
    """Parts of a stretch: a window of events starts at the first part in which one of them can cross."""
    return PARTS if chunk >= SKIPPED else 1


def narrow_bits(chunk: int) -> int:
    """Bits after the point with which a stretch's keys and F, up to one more unit than it has keys, fit into int32;
    no more than leave room for scores 128 units apart."""
    return min(22, 30 - (chunk - 1).bit_length())


def ring(config: Config) -> int:
    """Slots of a program's ring buffer: less than a window is left when a scan's worth is added."""
    return next_pow2(config["WINDOW"] + config["SCAN"])


def _default(problem, device):
    n = problem.n
    chunk = next(size for most, size in ((8192, 64), (65536, 256), (262144, 512), (n, 1024)) if n <= most)
    return Config(
        SORT=1024,
        CHUNK=chunk,
        WINDOW=128,
        SCAN=512,
        sort_warps=16,
        walk_warps=2 if 4096 < n <= 8192 else 4,  # a short row's programs do not fill the GPU: each is to be quick
        walk_registers=96,
    )


def _check(config, problem, device):
    sort, warps = config["SORT"], config["walk_warps"]
    if not 1 <= sort // (32 * config["sort_warps"]) <= 16:
        return "threads of the sort hold no key or too many"
    for name, most in (("WINDOW", 4), ("SCAN", 16), ("CHUNK", 8)):
        if not 1 <= 2 * config[name] // (32 * warps) <= 2 * most:
            return f"most threads of the walk hold nothing of a {name}, or all too much"
    return None


def _cost(config, problem):
    n, m = problem.n, problem.n - problem.w
    if m <= problem.k:
        return Cost(flops=0.0, bytes=20.0 * problem.rows * n)
    c = cuts(m, problem.k, config["CHUNK"])
    launches = 3 + len(rounds(m, config["SORT"])) + 4 * filtered(m, problem.k)
    stretches = c.stretches
    if filtered(m, problem.k):  # what is left of scores without a trend
        m = left(m, problem.k)
        stretches = -(-m // c.fine)
    new = c.chunk * min(1.0, problem.k / n)  # keys of a stretch that matter
    window = config["WINDOW"]
    windows = -(-(c.span / 2 + 3 * new) // window)
    walk = 2 * stretches * (windows * window * (100 + 8 * new) + 30 * (config["SCAN"] + c.span))
    sort = 400.0 * m
    search = 60.0 * m * max(1, m.bit_length())
    # Read: the scores. Written and mostly read again: sorted scores and their keys, events and their sums, places by
    # key, the table, the results.
    data = problem.rows * (
        n * 24.0 + m * 2 * (8 + 48 + 12) + 32.0 * (1 + stretches) * min(c.blocks, -(-2 * m // c.span))
    )
    return Cost(flops=problem.rows * (walk + sort + search), bytes=data, launches=launches)


TEMPLATE = Template(
    name="threshold",
    fields=frozenset({"k", "w", "n", "rows"}),
    space=(
        Param("SORT", Pow2(1024, 4096)),  # scores per sorted run
        Param("CHUNK", Pow2(64, 1024)),
        Param("WINDOW", Pow2(128, 1024)),
        Param("SCAN", Pow2(512, 4096)),
        Param("sort_warps", Choice((4, 8, 16))),
        Param("walk_warps", Choice((2, 4, 8))),
        Param("walk_registers", Choice((96, 128))),  # a thread, at most: it waits mostly, so more warps an SM help
    ),
    default=_default,
    check=_check,
    cost=_cost,
    sources=(
        __file__,
        *(str(Path(__file__).with_name(f"{name}.py")) for name in ("filter", "sort", "events", "crossing", "walk")),
    ),
)
