"""Masks of the attention kernels' tiles, against comparisons."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

from sparsek_tune.kernel_templates import tiles

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]


@triton.jit
def window_kernel(count_ptr, N, first, window, BQ: tl.constexpr, BN: tl.constexpr, AGAIN: tl.constexpr):
    """Count [BQ, N]: how often each query of the tile gets each key of its window. An edge's logits are all 1000.
    AGAIN: as forward does a tile again, all masked."""
    last = tl.minimum(first + BQ, N) - 1
    i = first + tl.arange(0, BQ)
    lo, clear, end = tiles.window_runs(first, last, window, 2 * BN if AGAIN else BN)
    if AGAIN:
        clear = end
    for step in range(0, (end - clear) // BN):
        j = clear + step * BN + tl.arange(0, BN)
        at = (i - first)[:, None] * N + j[None, :]
        there = (i < N)[:, None] & (j >= 0)[None, :]
        tl.store(count_ptr + at, tl.load(count_ptr + at, mask=there, other=0) + 1, mask=there)
    for step in range(0, tiles.edge_steps(lo, clear, end, last, BN)):
        block = tiles.edge_block(step, lo, clear, end, BN)
        j = block + tl.arange(0, BN)
        bound = tiles.edge_bound(tiles.distance(i, first), block, window, first, BN)
        weight = tl.exp2(tl.minimum(tl.full([BQ, BN], 1000.0, tl.float32), bound) - 1000.0)
        at = (i - first)[:, None] * N + j[None, :]
        there = (i < N)[:, None] & (weight > 0)
        tl.store(count_ptr + at, tl.load(count_ptr + at, mask=there, other=0) + weight.to(tl.int32), mask=there)


@pytest.mark.parametrize(("bq", "bn"), [(1, 16), (32, 16), (32, 32), (32, 128), (256, 16), (256, 128)])
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 200, 512, 1500])
@pytest.mark.parametrize("tile", [0, 1, -1])
@pytest.mark.parametrize("again", [False, True])
def test_every_query_gets_each_key_of_its_window_once(bq, bn, window, tile, again):
    n = 1999
    first = (n - 1) // bq * bq if tile < 0 else tile * bq
    count = torch.zeros(bq, n, dtype=torch.int32)
    window_kernel[(1,)](count, n, first, window, BQ=bq, BN=bn, AGAIN=again)
    i, j = torch.arange(first, first + bq)[:, None], torch.arange(n)
    assert torch.equal(count, ((j <= i) & (i - j < window) & (i < n)).int())


@triton.jit
def bound_kernel(begin_ptr, end_ptr, bound_ptr, base, BQ: tl.constexpr, BN: tl.constexpr):
    n = tl.arange(0, BN)
    i = tl.arange(0, BQ)
    middle, half = tiles.interval(tl.load(begin_ptr + n), tl.load(end_ptr + n), base)
    bound = tiles.bound(tiles.distance(base + i, base)[:, None], middle[None, :], half[None, :])
    tl.store(bound_ptr + i[:, None] * BN + n[None, :], bound)


@pytest.mark.parametrize("base", [0, 1000, 2**29 - 256])
def test_bound_is_above_all_logits_inside_the_interval_only(base):
    bq, bn, generator = 256, 512, torch.Generator().manual_seed(base)
    begin = base + torch.randint(-300, 300, (bn,), generator=generator)
    end = begin + torch.randint(-2, 300, (bn,), generator=generator)
    begin[:5] = torch.tensor([0, base + 7, base + 256, base + 8, 0])
    end[:5] = torch.tensor([2**29 - 1, 2**29 - 1, 2**29 - 1, base + 9, 0])
    bound = torch.empty(bq, bn)
    bound_kernel[(1,)](begin.int(), end.int(), bound, base, BQ=bq, BN=bn)
    i = base + torch.arange(bq)[:, None]
    inside = (begin <= i) & (i < end)
    assert bound[inside].min() > 1e34 and bound[~inside].max() < -1e34
    assert bound.isfinite().all()
