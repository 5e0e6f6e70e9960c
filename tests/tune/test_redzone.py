"""What a candidate does to memory shows: unwritten entries, reads and writes out of bounds, changed inputs."""

from __future__ import annotations

import pytest
import torch

from sparsek_tune import launch
from sparsek_tune.tune.redzone import SIZE, Fingerprint, MemoryCorrupted, redzones

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32]


def beside(t, offset):
    return t.as_strided((1,), (1,), t.storage_offset() + offset)


@pytest.mark.parametrize("size", [0, SIZE])
def test_new_buffers_show_what_was_not_written(size):
    like = torch.zeros(2, 3)
    with redzones(size):
        made = [
            torch.empty(2, 3),
            torch.empty_like(like),
            torch.empty_strided((2, 3), (3, 1)),
            like.new_empty((2, 3)),
            torch.empty(4, dtype=torch.bfloat16),
        ]
        ints = [like.new_empty(3, dtype=t) for t in (torch.int32, torch.int64)]
        assert float(torch.zeros(3).sum()) == 0.0 and torch.empty(0).shape == (0,)
    assert all(bool(t.isnan().all()) for t in made)
    assert all(bool((t < -(2**29)).all()) for t in ints)
    assert [t.dtype for t in made] == [torch.float32] * 4 + [torch.bfloat16]


def test_buffers_keep_their_strides_and_their_alignment():
    with redzones():
        assert torch.empty_like(torch.zeros(4, 5).t()).stride() == (1, 5)
        assert torch.empty_strided((2, 3), (4, 1)).stride() == (4, 1)
        plain = torch.empty(5, dtype=torch.float16)
    assert plain.data_ptr() % 64 == plain.untyped_storage().data_ptr() % 64 and SIZE % 512 == 0


def test_all_ends_with_the_block_even_after_an_error():
    before = torch.empty, torch.Tensor.new_empty, launch._carve
    with pytest.raises(KeyError), redzones():
        assert launch._carve is not before[2]
        raise KeyError
    assert (torch.empty, torch.Tensor.new_empty, launch._carve) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "where"), [(7, "after its end"), (-1, "before its start"), (5000, "after its end")])
def test_a_write_out_of_bounds_is_seen_whatever_is_written(dtype, offset, where):
    nan = [float("nan")] if dtype.is_floating_point else [torch.iinfo(dtype).min // 2]
    for value in (0, 1, *nan):
        with redzones() as zones:
            mine, other = torch.empty(7, dtype=dtype), torch.empty(7, dtype=dtype)
        beside(mine, offset)[0] = value
        with pytest.raises(MemoryCorrupted, match=f"^mine: written {where}$"):
            zones.check({"mine": mine, "other": other})


def test_a_write_within_bounds_is_none():
    with redzones() as zones:
        a, b = torch.empty(7), torch.empty((3, 5), dtype=torch.int32)
    a.zero_(), b.zero_()
    zones.check({"a": a, "b": b})


def test_a_buffer_without_a_name_is_told_by_where_it_was_made():
    with redzones() as zones:
        scratch = torch.empty((2, 3), dtype=torch.int32)
    beside(scratch, 6)[0] = 1
    with pytest.raises(MemoryCorrupted, match=r"^int32\[2, 3\] made in test_redzone.py:\d+: written after its end$"):
        zones.check({})


def test_neighbours_in_one_allocation_are_told_apart():
    with redzones() as zones:
        first, second = launch._carve(torch.zeros(1), torch.float32, 100, 100)
    first.zero_(), second.zero_()
    zones.check({})
    beside(first, first.numel())[0] = 0.0  # the first entry of the second, as it is laid out in programs
    with pytest.raises(MemoryCorrupted, match="after its end"):
        zones.check({})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_read_out_of_bounds_gives_poison(dtype):
    with redzones():
        t = torch.empty(7, dtype=dtype).zero_()
    for offset in (-1, 7, 1000):
        found = beside(t, offset)
        assert bool(found.isnan() if dtype.is_floating_point else abs(found) > torch.iinfo(dtype).max // 4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_a_fingerprint_sees_every_single_change(dtype):
    t = (torch.arange(1003) % 100).to(dtype)
    print_ = Fingerprint([("t", t[:500]), ("other", torch.zeros(3))])
    print_.check()
    for at in (0, 1, 499, 1000, 1002):  # the storage counts, not the view
        before = t[at].clone()
        t[at] += 1
        with pytest.raises(MemoryCorrupted, match=r"written though only read, or beside it: t$"):
            print_.check()
        t[at] = before
    t[:2] = t[:2].flip(0).clone()
    with pytest.raises(MemoryCorrupted):
        print_.check()


def test_a_fingerprint_covers_the_redzones():
    with redzones():
        t = torch.empty(10).zero_()
    print_ = Fingerprint([("t", t)])
    beside(t, -3)[0] = 0
    with pytest.raises(MemoryCorrupted, match="t"):
        print_.check()


def test_long_storages_are_fingerprinted_part_by_part(monkeypatch):
    from sparsek_tune.tune import redzone

    t = torch.arange(1001)
    whole = Fingerprint([("t", t)])._before
    monkeypatch.setattr(redzone, "_WORDS", 64)
    assert Fingerprint([("t", t)])._before == whole
