"""dkv in Triton's interpreter: its reduction's search over ranges as long as those of real lists, and keys in more
segments than it looks for at a time."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

from sparsek_tune import launch, reference
from sparsek_tune.kernel_templates import dkv
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune.redzone import redzones

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]
find = dkv._find


@triton.jit
def find_kernel(list_ptr, lo_ptr, hi_ptr, j_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    at = tl.arange(0, BLOCK)
    lo, hi = tl.load(lo_ptr + at), tl.load(hi_ptr + at)
    tl.store(out_ptr + at, find(list_ptr + at * 0, lo, hi, tl.load(j_ptr + at), hi > lo, STEPS))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 500, 1023, 1024, 1025, 4096])
@pytest.mark.parametrize("first", [0, 5])
def test_every_entry_is_found(length, first):
    keys = torch.cumsum(
        torch.randint(1, 4, (first + length,), generator=torch.Generator().manual_seed(length)), 0
    ).int()
    places = torch.linspace(0, length - 1, 62).round().int() + first
    lo, hi = torch.full((64,), first, dtype=torch.int32), torch.full((64,), first + length, dtype=torch.int32)
    hi[62:] = first  # nothing to search: nothing is read
    out = torch.full((64,), -1, dtype=torch.int32)
    sought = torch.cat([keys[places], torch.full((2,), 1 << 30).int()])
    find_kernel[(1,)](keys, lo, hi, sought, out, BLOCK=64, STEPS=dkv.search_steps(length))
    assert torch.equal(out, torch.cat([places, lo[62:]]))


@pytest.mark.parametrize(("entries", "steps"), [(0, 0), (1, 0), (2, 1), (32, 1), (33, 2), (1024, 2), (1025, 3)])
def test_steps_narrow_any_range_to_one_entry(entries, steps):
    assert dkv.search_steps(entries) == steps


@pytest.mark.parametrize(
    ("k", "w", "g", "d", "gate", "block"),
    [(9, 7, 2, 24, "kv", 8), (9, 0, 1, 16, "v", 16), (9, 33, 3, 20, "none", 1), (4, 0, 1, 16, "kv", 64)],
)
def test_keys_of_many_segments(k, w, g, d, gate, block):
    """From the reference's selection: the first keys, with the best scores, are in every segment from theirs on."""
    n, size, scale, generator = 150, 16, 0.3, torch.Generator().manual_seed(0)
    query, key, value, dout = (torch.randn(1, h, n, d, generator=generator) for h in (2 * g, 2, 2, 2 * g))
    scores = torch.randn(1, 2, n, generator=generator)
    scores[..., :3] += 6
    exact = [t.double() for t in (query, key, value, scores)]
    out, lse, *found = reference.attention_forward(*exact, k, w, scale, gate)
    want = reference.attention_backward(dout.double(), *exact, out, lse, reference.Selection(*found), k, w, scale, gate)
    selection = reference.Selection(found[0].float(), *found[1:])
    assert int((selection.expiry[..., 0] - 1 - w).min()) // size >= 2 * dkv.AHEAD.value - 1 - w // size
    tile = Config(BM=16, BN=16, num_warps=4, num_stages=1, registers=255)
    with redzones() as zones:
        lists = launch.schedule(scores, selection, k, w, Config(SEGMENT=size, BLOCK=64, num_warps=1, registers=64))
        args = query, key, value, scores
        _, delta, gbar = launch.dq(
            dout, *args, out.float(), lse.float(), selection, lists, w, scale, gate, tile
        )  # fmt: skip
        got = launch.dkv(
            dout, *args, lse.float(), delta, gbar, selection, lists, w, scale, gate,
            Config({**tile, "BLOCK": block, "reduce_warps": 1}),
        )  # fmt: skip
    zones.check(dict(zip(("dk", "dv", "du"), got, strict=True)))
    for x, y in zip(got, want[1:], strict=True):
        assert (x.double() - y).norm() <= 2e-5 * max(y.norm(), 1e-3 * dout.norm())
