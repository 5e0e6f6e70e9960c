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
def gate(u, tau):
    """clip(u - tau, 0, 1) (paper, section 3); tau = -inf gives 1, also where u is -inf (a key masked by its score)."""
    return tl.minimum(tl.maximum(tl.maximum(u, -3.0e38) - tau, 0.0), 1.0)


@triton.jit
def list_range(bounds_ptr, start_ptr, stop_ptr, slot, first, last, BN: tl.constexpr):
    """What queries [first, last] read of their segment's list, as two masked runs around one that needs no mask:
    [lo, free) masked, [free, free_end) whole blocks of saturated keys, [free_end, hi) masked."""
    lo = tl.load(start_ptr + first)
    hi = tl.load(stop_ptr + last)
    free = tl.load(bounds_ptr + slot * 4 + 1)
    free_end = free + (tl.load(bounds_ptr + slot * 4 + 2) - free) // BN * BN
    return lo, free, free_end, hi


@triton.jit
def masked_run(step, lo, free, free_end, hi, BN: tl.constexpr):
    """Begin and end of masked block number ``step``: the blocks of [lo, free), then those of [free_end, hi)."""
    before = tl.cdiv(free - lo, BN)
    left = step < before
    return tl.where(left, lo + step * BN, free_end + (step - before) * BN), tl.where(left, free, hi)


def tile_smem(problem, rows: int, keys: int, matrices_rows: int, matrices_keys: int, stages: int) -> int:
    """Shared memory (bytes) of row tiles held for the whole loop and key tiles held ``stages`` deep, at least."""
    width = next_pow2(max(problem.d, 16)) * DTYPE_BYTES[problem.dtype]
    return width * (rows * matrices_rows + keys * matrices_keys * stages)


def default_tile(problem, rows: int, keys: int) -> dict[str, int]:
    """A tile that does not spill: (rows, keys) up to D = 128, smaller where D is larger or dots are unrolled (fp32)."""
    if problem.dtype == "fp32":
        rows = keys = 32 if problem.d <= 64 else 16
    elif problem.d > 128:
        rows = keys = 32
    return {"BM": max(rows, next_pow2(problem.g)), "BN": keys, "num_warps": 4, "num_stages": 2}


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
