"""What the attention kernels share: the tile of query rows, the walk over a segment's list, masks and gates.

A tile holds BQ consecutive queries times the HEADS query heads of one KV head (rounded up to a power of two: rows of a
missing head are masked), so that all share the gathered keys. Row m is query ``m // HEADS``, head ``m % HEADS``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .base import DTYPE_BYTES, next_pow2

GATE_KV = tl.constexpr(0)
GATE_V = tl.constexpr(1)
GATE_NONE = tl.constexpr(2)
GATES = {"kv": 0, "v": 1, "none": 2}
LOG2E = tl.constexpr(1.4426950408889634)
HUGE = tl.constexpr(2.0**115)  # half of it (2e34) is above all logits, two thousand times are still float32


@triton.jit
def load_rows(ptr, index, stride, ok, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Rows ``index`` of a matrix with contiguous rows of D elements, as [rows, BD]; zero where not ok or past D."""
    d = tl.arange(0, BD)
    if WIDE:
        index = index.to(tl.int64)
    at = ptr + (index * stride)[:, None] + d[None, :]
    if D == BD:
        return tl.load(at, mask=ok[:, None], other=0.0)
    return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, index, stride, ok, x, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """The inverse of :func:`load_rows`."""
    d = tl.arange(0, BD)
    if WIDE:
        index = index.to(tl.int64)
    mask = ok[:, None]
    if D != BD:
        mask = mask & (d < D)[None, :]
    tl.store(ptr + (index * stride)[:, None] + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def unit(x):
    """clip(x, 0, 1): with the addition before it one saturating instruction."""
    return tl.maximum(tl.minimum(x, 1.0), 0.0)


@triton.jit
def gate(u, tau):
    """clip(u - tau, 0, 1) (paper, section 3); tau = -inf gives 1, also where u is -inf (a key masked by its score)."""
    return unit(tl.maximum(u, -3.0e38) - tau)


@triton.jit
def gated_grads(a, g, s, dp, delta, scale, GATE: tl.constexpr):
    """dL/ds of the products s = q.k before scaling, and dL/dm, from softmax weights a, gates g and dp = do.v."""
    ds = a * (g * dp - delta)
    dm = a * dp
    if GATE == GATE_KV:
        dm += ds * s * scale
        ds = ds * g
    return ds, dm


@triton.jit
def list_runs(
    bounds_ptr, start_ptr, stop_ptr, late_stop_ptr, slot, first, last, BN: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """What queries [first, last] read of their segment's list. Whole blocks that every query sees: [clear, plain) and
    [end, born) gated, [plain, end) saturated. The rest is masked: [lo, clear), [born, hi), [late, late_hi). Without
    gates all that needs no mask is in the saturated run."""
    lo = tl.load(start_ptr + first)
    alive = tl.load(start_ptr + last)  # from here on nothing is dropped before the last query
    plain = tl.load(bounds_ptr + slot * 5 + 1)
    end = tl.load(bounds_ptr + slot * 5 + 2)
    seen = tl.load(stop_ptr + first)  # up to here everything is born by the first
    if not GATED:
        plain = seen
        end = seen
    born = end + (seen - end) // BN * BN
    plain = end - (end - plain) // BN * BN
    clear = plain - (plain - alive) // BN * BN
    if not GATED:
        plain = clear
    late = tl.load(bounds_ptr + slot * 5 + 3)
    return lo, clear, plain, end, born, tl.load(stop_ptr + last), late, tl.load(late_stop_ptr + last)


@triton.jit
def window_runs(first, last, window, BN: tl.constexpr):
    """The window keys of queries [first, last] in blocks from lo on: those of [clear, end) every query sees, the edges
    [lo, clear) and [end, last] are masked. Only the last block is not whole."""
    lo = tl.maximum(first - window + 1, 0)
    clear = lo + tl.cdiv(tl.maximum(last - window + 1, 0) - lo, BN) * BN
    return lo, clear, clear + tl.maximum(first + 1 - clear, 0) // BN * BN


@triton.jit
def plain_keys(list_ptr, step, plain, listed, window_clear, SELECTED: tl.constexpr, WINDOW: tl.constexpr,
               BN: tl.constexpr):  # fmt: skip
    """Keys of block number ``step`` of those without mask and gate: ``listed`` of the list, then the window's. Any keys
    past the last block, whose values are not used."""
    n = tl.arange(0, BN)
    j = window_clear + (step - listed) * BN + n
    if SELECTED:
        chosen = tl.load(list_ptr + plain + step * BN + n, mask=step * BN + n < listed * BN, other=0)
        j = tl.where(step < listed, chosen, j) if WINDOW else chosen
    return j


@triton.jit
def gated_entries(step, clear, plain, end, BN: tl.constexpr):
    """Positions in the list of block number ``step`` of the gated runs, [clear, plain) and then from end on."""
    before = plain - clear
    at = step * BN
    return tl.where(at < before, clear + at, end + at - before) + tl.arange(0, BN)


@triton.jit
def masked_entries(step, runs, BN: tl.constexpr):
    """Block number ``step`` of the masked runs of a list, [lo, clear), [born, hi) and [late, late_hi), one after the
    other: positions in the list, and whether they are of a run."""
    lo, clear, born, hi, late, late_hi = runs
    e = step * BN + tl.arange(0, BN)
    below = clear - lo
    early = below + hi - born
    entry = tl.where(e < below, lo + e, tl.where(e < early, born + e - below, late + e - early))
    return entry, e < early + late_hi - late


@triton.jit
def masked_steps(runs, BN: tl.constexpr):
    """Number of blocks of the masked runs."""
    lo, clear, born, hi, late, late_hi = runs
    return tl.cdiv(clear - lo + hi - born + late_hi - late, BN)


@triton.jit
def masked_keys(list_ptr, step, runs, BN: tl.constexpr):
    """Their keys, 0 where there is none."""
    entry, inside = masked_entries(step, runs, BN)
    return tl.load(list_ptr + entry, mask=inside, other=0)


@triton.jit
def masked_columns(list_ptr, u_ptr, expiry_ptr, step, runs, window, BN: tl.constexpr):
    """Their scores, and the queries [first, until) that see them: none where there is no key."""
    entry, inside = masked_entries(step, runs, BN)
    u = tl.load(u_ptr + entry, mask=inside, other=0.0)
    first = tl.load(list_ptr + entry, mask=inside, other=0) + window
    until = tl.load(expiry_ptr + entry, mask=inside, other=0)
    return u, first, until


@triton.jit
def edge_steps(lo, clear, end, last, BN: tl.constexpr):
    """Number of blocks of the window's edges."""
    return (clear - lo) // BN + tl.cdiv(last + 1 - end, BN)


@triton.jit
def edge_block(step, lo, clear, end, BN: tl.constexpr):
    """The first key of block number ``step`` of the edges."""
    return step * BN + tl.where(step * BN < clear - lo, lo, end - (clear - lo))


@triton.jit
def distance(i, base):
    """Of queries from query ``base``, up to 256, for :func:`bound`: HUGE times so many, exact in float32."""
    return (i - base).to(tl.float32) * HUGE


@triton.jit
def interval(begin, end, base):
    """Middle and half width of the queries [begin, end) that see a key, for :func:`bound`."""
    begin = tl.maximum(tl.minimum(begin - base, 1024), -1024)
    end = tl.maximum(tl.minimum(end - base, 1024), -1024)
    return (begin + end - 1).to(tl.float32) * (0.5 * HUGE), (end - begin).to(tl.float32) * (0.5 * HUGE)


@triton.jit
def bound(near, middle, half):
    """Of the logit of a query at :func:`distance` near: above all logits where the interval has the query, below all
    elsewhere. In arithmetic: a tile of comparisons does not fit the predicate registers; packing them costs more."""
    return half - tl.abs(near - middle)


@triton.jit
def edge_bound(near, block, window, base, BN: tl.constexpr):
    """The same [rows, BN] of the keys from ``block`` on, each of which is seen by the window queries from it on."""
    middle, half = interval(block, block + window, base)
    return bound(near[:, None], middle + tl.arange(0, BN).to(tl.float32)[None, :] * HUGE, half)


def tile_smem(problem, rows: int, keys: int, matrices_rows: int, matrices_keys: int, stages: int) -> int:
    """Shared memory (bytes) of row tiles held for the whole loop and key tiles held ``stages`` deep, at least."""
    width = next_pow2(max(problem.d, 16)) * DTYPE_BYTES[problem.dtype]
    return width * (rows * matrices_rows + keys * matrices_keys * stages)


def default_tile(problem, rows: int, keys: int, stages: int) -> dict[str, int]:
    """A tile that does not spill: (rows, keys) up to D = 128, smaller where D is larger or dots are unrolled (fp32).
    registers: the most a thread may have; fewer let more programs share a multiprocessor."""
    warps, registers = 4, 255
    if problem.dtype == "fp32":
        rows, keys, stages, warps = (32, 32, 2, 4) if problem.d <= 64 else (16, 16, 2, 8)
    elif problem.d > 128:
        rows, keys, stages = 32, 32, 2
    elif problem.d <= 64:
        registers = 168
    rows = max(rows, next_pow2(problem.g))
    return {"BM": rows, "BN": keys, "num_warps": warps, "num_stages": stages, "registers": registers}


def mma_cost(problem, rows: float, tile_rows: int, other: int) -> tuple[float, float]:
    """What tiles cost over ideal ones: the factor on FLOPs where the instruction of fewer than 64 rows runs at about
    half of the rate of Hopper's wgmma, and the bytes that come from L2, as device-memory bytes (about half the rate's
    cost), when ``rows`` rows of D elements are read once per tile of ``other`` rows."""
    width = problem.d * DTYPE_BYTES[problem.dtype]
    return (1.0 if tile_rows >= 64 else 2.0), rows / other * width * 0.5


def tile_error(config, problem, device, matrices_rows: int, matrices_keys: int) -> str | None:
    """Why a (BM, BN) tile of an attention kernel cannot run, or None."""
    heads = next_pow2(problem.g)
    if config["BM"] < 16 or config["BN"] < 16:
        return "tl.dot needs at least 16 rows"
    if config["BM"] < heads:
        return f"BM {config['BM']} does not hold one query's {heads} heads"
    if config["BM"] // heads > 256:
        return "a tile of more than 256 queries may cross a segment"
    if problem.dtype == "fp32" and config["BM"] * config["BN"] * next_pow2(max(problem.d, 16)) > 1 << 18:
        return "an IEEE fp32 dot is unrolled: too much code for this tile"
    depth = max(1, config["num_stages"] - 1)
    smem = tile_smem(problem, config["BM"], config["BN"], matrices_rows, matrices_keys, depth)
    if smem > device.smem:
        return f"shared memory: needs at least {smem} bytes, {device.smem} available"
    return None
