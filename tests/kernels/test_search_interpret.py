"""The search of dkv's reduction in Triton's interpreter, over ranges as long as those of real lists."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

from sparsek_tune.kernel_templates import dkv

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
