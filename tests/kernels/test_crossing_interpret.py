"""When events cross, in int32 and int64, against plain sums, in stretches of all lengths."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

from sparsek_tune.kernel_templates import crossing, threshold

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]

WINDOW = 16


@triton.jit
def crossings_kernel(
    x_ptr, value_ptr, minus_ptr, q_ptr, t_ptr, new_x_ptr, narrow_ptr, out_ptr, count, n, bits, origin, C: tl.constexpr,
    NARROW_BITS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """As the walk calls it. out int32 [2, WINDOW]."""
    at, w = tl.arange(0, C), tl.arange(0, WINDOW)
    add = at < count
    q = tl.load(q_ptr + at, mask=add, other=0)
    drop = tl.maximum(bits - NARROW_BITS, 0)
    low = (1 << drop) - 1
    rounded = tl.max((add & (((q - origin) & low) != 0)).to(tl.int32), 0) > 0
    new = crossing.list_new_keys(
        q, crossing.narrow(q, origin, drop), add, t_ptr, new_x_ptr, narrow_ptr, 0, C, True
    )  # fmt: skip
    x, value = tl.load(x_ptr + w), tl.load(value_ptr + w)
    minus = tl.load(minus_ptr + w) != 0
    rounded = rounded | (tl.max(((((x - origin) | value) & low) != 0).to(tl.int32), 0) > 0)
    one = tl.full([], 1, tl.int64) << bits
    reach, pass_ = crossing.run_tau(
        value, x, minus, w >= 0, new_x_ptr, narrow_ptr, n, new, one, origin, drop, rounded, C
    )  # fmt: skip
    tl.store(out_ptr + w, reach)
    tl.store(out_ptr + WINDOW + w, pass_)


def check(x, value, minus, q, chunk, bits, n=0):
    """x falling, value (F - goal after n keys) and minus by event; q by key: int64, fixed point."""
    one, new, keys = 1 << bits, q.numel(), crossing.KEYS.value
    states = torch.cat([value[None], value + (q[n:, None] - x).clamp(0, one).cumsum(0)])
    t, narrow = torch.empty(chunk, dtype=torch.int32), torch.empty(chunk + keys, dtype=torch.int32)
    new_x, out = torch.empty(chunk + keys, dtype=torch.int64), torch.empty((2, WINDOW), dtype=torch.int32)
    crossings_kernel[(1,)](
        x, value, minus.int(), q, t, new_x, narrow, out, new, n, bits, int(x[0]), C=chunk,
        NARROW_BITS=threshold.narrow_bits(chunk), WINDOW=WINDOW,
    )  # fmt: skip
    reach, pass_ = (row.clamp(max=new + 1) for row in out)  # past the last key all counts mean never
    assert torch.equal(reach.long(), n + (states < 0).sum(0))
    assert torch.equal(pass_.long()[minus], (n + (states <= 0).sum(0))[minus])


def events(generator, one, spread):
    x = (
        (torch.rand(WINDOW, generator=generator, dtype=torch.float64) * spread * one)
        .long()
        .sort(descending=True)
        .values
    )
    return x, torch.rand(WINDOW, generator=generator) < 0.5


@pytest.mark.parametrize("chunk", [64, 512])
@pytest.mark.parametrize("bits", [12, 24, 40])
@pytest.mark.parametrize("spread", [0.3, 3.0, 1000.0])
def test_events_among_random_keys(chunk, bits, spread):
    generator, one = torch.Generator().manual_seed(chunk + bits), 1 << bits
    x, minus = events(generator, one, spread)
    q = ((torch.randn(chunk, generator=generator, dtype=torch.float64) * 2 + spread) * one).long()
    value = -(torch.rand(WINDOW, generator=generator, dtype=torch.float64) * chunk * one).long()
    check(x, value, minus, q, chunk, bits)
    check(x, value // 4, minus, q[: chunk // 3], chunk, bits, n=5)


@pytest.mark.parametrize("chunk", [64, 2048, 4096])
@pytest.mark.parametrize("kept", [30, 15])
def test_keys_that_add_a_whole_unit_each(chunk, kept):
    """The largest sums that there are: of one event that is never reached, and of one that crossed at once. kept: bits
    of x; with few of them nothing is rounded, and nothing done again in int64."""
    bits, generator = 30, torch.Generator().manual_seed(0)
    x, minus = events(generator, 1 << bits, 0.1)
    x = x >> (bits - kept) << (bits - kept)
    q = torch.full((chunk,), 3 << bits)
    value = torch.full((WINDOW,), -(chunk + 5) << bits)
    value[::2] = 0
    value[1] = -chunk << bits
    check(x, value, minus, q, chunk, bits)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_sums_at_the_goal(off):
    """All keys a third of a unit above all events, F a rounding below or above the goal, or at it, after 30 of them."""
    bits, chunk = 40, 64
    x = torch.full((WINDOW,), 1 << 30)
    q = x[0] + torch.full((chunk,), (1 << bits) // 3)
    value = torch.full((WINDOW,), -30 * ((1 << bits) // 3) + off)
    check(x, value, torch.arange(WINDOW) % 2 == 0, q, chunk, bits)
    check(x, value * 0 - off, torch.arange(WINDOW) % 2 == 0, q[:0], chunk, bits)
