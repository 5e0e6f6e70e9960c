"""Replayed calls, with kernels that are Python functions of addresses: the same results as the call worked out anew."""

from __future__ import annotations

import ctypes
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_tune import launcher, replay

SIZE = 64  # int64 of every tensor here


class Mix:
    """A kernel that makes its target ``factor`` times the sum of its sources, plus ``shift``."""

    arg_names = ("target", "a", "b", "shift", "factor")

    def __init__(self):
        self.pre_run_hooks, self.ordinary, self.direct = [], 0, 0

    def __getitem__(self, grid):
        def launch(target, a, b, shift, *, factor, enable_fp_fusion):
            assert enable_fp_fusion and grid == (3, 2)
            self.ordinary += 1
            self._compute(*(t.data_ptr() for t in (target, a, b)), shift, factor)
            return self

        return launch

    def by_address(self, x, y, z, stream, target, a, b, shift, factor):
        assert (x, y, z, stream) == (3, 2, 1, 7)
        self.direct += 1
        self._compute(target, a, b, shift, factor)

    @staticmethod
    def _compute(target, a, b, shift, factor):
        at = [(ctypes.c_int64 * SIZE).from_address(p) for p in (target, a, b)]
        at[0][:] = [(i + j) * factor + shift for i, j in zip(at[1], at[2], strict=True)]


@pytest.fixture
def kernel(monkeypatch):
    mix = Mix()
    monkeypatch.setattr(launcher, "observed", lambda: False)
    monkeypatch.setattr(launcher, "bind", lambda k: launcher.Bound(k.by_address, (), False, k))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(replay, "_capturing", lambda: False)
    replay.clear()
    yield mix
    replay.clear()


def run(function, tensors, *rest):
    call = replay.call(tensors, *rest)
    plan = call.plan
    return call.work_out(function, tensors) if plan is None else plan(call.pointers)


def tensors(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(-9, 9, (SIZE,), generator=g) for _ in range(count)]


def mix(kernel, target, a, b, shift=1, factor=3):
    launcher.launch(kernel, (3, 2), (target, a, b, shift), {"factor": factor})


def two_steps(kernel):
    def function(x, y):
        scratch, out = x.new_empty(4 * SIZE).split(2 * SIZE)[1][SIZE:], x.new_empty(SIZE)
        mix(kernel, scratch, x, y)
        mix(kernel, out, scratch, x, shift=0)
        return (out,)

    return function


def expected(x, y):
    return ((x + y) * 3 + 1 + x) * 3


def test_the_third_call_is_replayed(kernel):
    for seed, ordinary in ((1, 2), (2, 4), (3, 4), (4, 4)):
        x, y = tensors(2, seed)
        (out,) = run(two_steps(kernel), (x, y), "stage")
        assert torch.equal(out, expected(x, y))
        assert kernel.ordinary == ordinary
    assert kernel.direct == 4


def test_a_replay_frees_what_later_launches_do_not_need(kernel, monkeypatch):
    """Scratch that the call drops before it allocates a result is gone in the replay too."""
    wide, kept = 1 << 22, SIZE

    def function(x, y):
        early, held = x.new_empty(kept), x.new_empty(kept)
        scratch = x.new_empty(wide)
        mix(kernel, scratch, x, y)
        mix(kernel, held, scratch, y)
        mix(kernel, early, scratch, held)
        del scratch
        late = x.new_empty(wide)
        mix(kernel, late, held, x)
        return late, early

    for seed in range(2):
        run(function, tensors(2, seed), "stage")
    alive, peak, empty = [], [0], torch.empty_strided

    def watched(*args, **kwargs):
        made = empty(*args, **kwargs)
        alive.append(weakref.ref(made))
        peak.append(sum(t.nbytes for t in (r() for r in alive) if t is not None))
        return made

    args = tensors(2, 9)
    monkeypatch.setattr(torch, "empty_strided", watched)
    got = run(function, args, "stage")
    monkeypatch.undo()
    assert kernel.direct == 4 and (wide + 2 * kept) * 8 <= max(peak) <= (wide + 4 * kept) * 8
    assert [t.shape[0] for t in got] == [wide, kept]
    held = ((args[0] + args[1]) * 3 + 1 + args[1]) * 3 + 1
    assert torch.equal(got[0][:SIZE], (held + args[0]) * 3 + 1)
    assert torch.equal(got[1], ((args[0] + args[1]) * 3 + 1 + held) * 3 + 1)


def test_one_phase_where_two_save_too_little():
    """Two launches; a scratch of the first and a result of the second need not be there together."""
    uses, half, twice = {0: (0, 0), 1: (1, 1)}, replay.WORTH // 2, 2 * replay.WORTH
    assert len(replay.divide([half, half], uses, {1: None}, 2)) == 1
    assert len(replay.divide([twice, twice], uses, {1: None}, 2)) == 2


def test_one_phase_where_the_first_needs_most():
    """The scratch of the first launch stands beside its result in any case."""
    m = replay.WORTH
    assert len(replay.divide([m, 8 * m, m // 2], {0: (0, 0), 1: (0, 0), 2: (1, 1)}, {0: None, 2: None}, 2)) == 1


class Copy(Mix):
    """Does not look at its second source."""

    @staticmethod
    def _compute(target, a, b, shift, factor):
        Mix._compute(target, a, a, shift, factor)


def test_results_of_any_shape_and_nothing_at_all(kernel):
    """A result of two dimensions; an allocation of no bytes that both phases take."""
    copy = Copy()

    def function(x, y):
        nothing, wide = x.new_empty(0), x.new_empty(1 << 22)
        mix(copy, wide, x, nothing)
        del wide
        late = x.new_empty((2, 1 << 17))
        mix(copy, late, y, nothing)
        return (late,)

    for seed in range(3):
        x, y = tensors(2, seed)
        (late,) = run(function, (x, y), "stage")
        assert late.shape == (2, 1 << 17) and late.stride() == (1 << 17, 1)
        assert torch.equal(late[0, :SIZE], 2 * y * 3 + 1)
    assert copy.direct == 2


def test_an_empty_view_has_an_address_in_its_buffer(kernel):
    """PyTorch says that the address of an empty tensor is zero."""
    seen = []

    class Watched(Mix):
        def _compute(self, target, a, b, shift, factor):
            seen.append((target, a))

    def function(x):
        out = x.new_empty(SIZE)
        mix(watched, out, out[SIZE:], x)
        return (out,)

    watched = Watched()
    for _ in range(3):
        run(function, tensors(1), "stage")
    target, empty = seen[-1]
    assert watched.direct == 1 and empty == target + SIZE * 8


def test_arguments_that_were_one_tensor_are_told_apart(kernel):
    x, y = tensors(2)
    for pair in ((x, x), (x, x), (x, y), (y, x)):
        assert torch.equal(run(two_steps(kernel), pair, "stage")[0], expected(*pair))
    assert kernel.direct == 4


@pytest.mark.parametrize("what", ["rest", "shape", "stride", "dtype", "alignment"])
def test_what_is_not_equal_is_not_replayed(kernel, what):
    x, y = tensors(2)
    key = replay.call((x, y), "stage", 1).key
    if what == "rest":
        assert replay.call((x, y), "stage", 2).key != key
        return
    wide = torch.zeros(4 * SIZE, dtype=torch.int64)
    other = {
        "shape": wide[: SIZE // 2],
        "stride": wide[: 2 * SIZE : 2],
        "dtype": wide[:SIZE].double(),
        "alignment": wide[1 : SIZE + 1],
    }[what]
    assert replay.call((x, other), "stage", 1).key != key
    assert replay.call((x, y.clone()), "stage", 1).key == key


@pytest.mark.parametrize(
    "what", ["copy", "copy in a freed place", "foreign", "other operator", "view as result", "argument as result"]
)
def test_what_is_more_than_launches_is_never_replayed(kernel, what):
    foreign = torch.zeros(SIZE, dtype=torch.int64)

    def function(x, y):
        out = x.new_empty(2 * SIZE)[:SIZE] if what == "view as result" else x.new_empty(SIZE)
        if what == "copy":
            x = x.view(8, 8).t().contiguous().t().reshape(SIZE)
        if what == "copy in a freed place":  # where the allocator gives the copy what it gave the buffer before
            mix(kernel, x.new_empty(SIZE), x, y)
            y = y.view(8, 8).t().contiguous().view(SIZE)
        if what == "other operator":
            y = y + 0
        mix(kernel, out, x, foreign if what == "foreign" else y)
        return (x,) if what == "argument as result" else (out,)

    for i in range(5):
        run(function, tensors(2), "stage")
        assert not kernel.direct and kernel.ordinary >= i + 1


def test_not_while_launches_are_observed(kernel, monkeypatch):
    x, y = tensors(2)
    for _ in range(3):
        run(two_steps(kernel), (x, y), "stage")
    assert kernel.direct == 2
    monkeypatch.setattr(launcher, "observed", lambda: True)
    run(two_steps(kernel), (x, y), "stage")
    monkeypatch.setattr(launcher, "observed", lambda: False)
    kernel.pre_run_hooks.append(print)
    run(two_steps(kernel), (x, y), "stage")
    assert (kernel.direct, kernel.ordinary) == (2, 8)


def test_nothing_is_remembered_of_a_capture(kernel, monkeypatch):
    monkeypatch.setattr(replay, "_capturing", lambda: True)
    for _ in range(4):
        run(two_steps(kernel), tensors(2), "stage")
    assert kernel.direct == 0 and not replay._plans


def test_the_number_of_calls_remembered_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    for i in range(10):
        run(two_steps(kernel), tensors(2), i)
        assert len(replay._plans) <= 3


def test_an_error_while_recording_leaves_everything_in_order(kernel):
    x, y = tensors(2)
    run(two_steps(kernel), (x, y), "stage")
    with pytest.raises(ZeroDivisionError):
        run(lambda *t: 1 // 0, (x, y), "stage")
    for _ in range(2):
        assert torch.equal(run(two_steps(kernel), (x, y), "stage")[0], expected(x, y))
    assert kernel.direct == 2


PROGRAM = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.booleans(), st.integers(-3, 3)), max_size=12)


@given(PROGRAM, st.integers(0, 3), st.sampled_from([0, replay.WORTH]))
@settings(max_examples=200, deadline=None)
def test_any_program_of_launches(program, results, worth):
    """Buffers that are dropped at once, kept, or returned; each launch reads any two that are still there."""
    kernel = Mix()

    def function(x, y):
        alive, out = [x, y], [x.new_empty(SIZE) for _ in range(results)]
        for a, b, keep, shift in program:
            target = x.new_empty(SIZE + 8 * (a % 5))[:SIZE]
            mix(kernel, target, alive[a % len(alive)], alive[b % len(alive)], shift, 2)
            alive = [*(alive if keep else alive[-2:]), target]
        for i, t in enumerate(out):
            mix(kernel, t, alive[-1 - i % len(alive)], x, i, 1)
        return tuple(out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "observed", lambda: False)
        patch.setattr(launcher, "bind", lambda k: launcher.Bound(k.by_address, (), False, k))
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        patch.setattr(replay, "_capturing", lambda: False)
        patch.setattr(replay, "WORTH", worth)
        replay.clear()
        for seed in range(4):
            args = tensors(2, seed)
            for got, want in zip(run(function, args, "stage"), function(*args), strict=True):
                assert torch.equal(got, want)
        assert kernel.direct == 2 * (len(program) + results)
        replay.clear()


BUFFERS = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 9), st.integers(0, 4)), max_size=14)


@given(BUFFERS)
def test_buffers_in_use_at_the_same_time_do_not_overlap(buffers):
    sizes = [size for size, *_ in buffers]
    uses = {i: (first, first + length) for i, (_, first, length) in enumerate(buffers)}
    offsets, end = replay.pack(sizes, uses)
    assert set(offsets) == set(uses) and end <= sum(-(-s // 512) * 512 for s in sizes)
    for i, low in offsets.items():
        assert low % 512 == 0 and low + sizes[i] <= end
        for j in offsets:
            together = uses[i][0] <= uses[j][1] and uses[j][0] <= uses[i][1]
            if i != j and together:
                assert low + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= low


def test_grids_are_completed():
    assert [launcher.three(g) for g in ((5,), (5, 6), (5, 6, 7))] == [(5, 1, 1), (5, 6, 1), (5, 6, 7)]


def test_what_cannot_be_bound_stays_ordinary():
    assert launcher.bind(None) is None
    assert launcher.bind(SimpleNamespace(packed_metadata=(), run=print, function=1)) is None
