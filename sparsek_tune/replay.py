"""Calls that differ from an earlier one in nothing but addresses and numbers in memory are replayed.

What a stage launches follows from shapes, strides, dtypes, alignment and options alone (``launch``). So the second call
of a kind is recorded: which tensors it allocated, and which kernels it launched with which arguments. From then on such
a call is a table: allocate the results and a workspace, and launch each kernel with the addresses filled in. That
takes a few microseconds a launch, where working everything out anew takes ten times that. Where that saves more than
WORTH, the launches are two phases, and the second takes what the first no longer needs.

A call is replayed only where all that the recorded one depended on is equal, its arguments' validity included, and
where nothing observes launches (``launcher.observed``). A call that did anything but allocate, take views and launch is
never replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import launcher
from .launcher import Bound, Launch

MOST = 1024  # calls remembered; a few kilobytes each
ALIGNED = 512  # bytes: how PyTorch's own allocations are aligned
WORTH = 16 << 20  # bytes that a second phase must save and more: it costs a tenth of a short call's host time

_ALLOCATING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_plans: dict[Any, Plan | bool] = {}  # True: seen once; False: cannot be replayed

_Kind = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Phase(NamedTuple):
    """Launches, and the memory that they are the first to use. kept: shape, strides and dtype of what lives until the
    call ends; scratch: int32 elements of what ends with the phase; cells: (base, offset) of every address that no phase
    before used; steps: each takes its arguments out of the pool by position."""

    kept: tuple[_Kind, ...]
    scratch: int
    cells: tuple[tuple[int, int], ...]
    steps: tuple[tuple[Bound, tuple[int, int, int], Callable[[Any], tuple[Any, ...]]], ...]


class Plan(NamedTuple):
    """A recorded call. A base is an argument or, phase by phase, what the phase keeps and then its scratch; the pool is
    all constants, then the addresses of the cells, phase by phase."""

    device: torch.device
    constants: tuple[Any, ...]
    phases: tuple[Phase, ...]
    results: tuple[int, ...]  # positions among all that is kept
    hooks: tuple[list[Any], ...]  # of the kernels; all empty when recorded

    def __call__(self, pointers: Sequence[int]) -> tuple[Tensor, ...]:
        """The call with arguments at these addresses, on the current stream of the current device."""
        device, kept, bases, pool = self.device, [], [*pointers], [*self.constants]
        empty = torch.empty_strided  # half the time of torch.empty
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        for kinds, size, cells, steps in self.phases:
            scratch = None  # that of the phase before makes room first
            made = [empty(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in kinds]
            scratch = empty((size,), (1,), dtype=torch.int32, device=device) if size else None
            kept += made
            bases += [t.data_ptr() for t in made]
            bases.append(0 if scratch is None else scratch.data_ptr())
            pool += [bases[base] + offset for base, offset in cells]
            for (run, head, nested, _), grid, take in steps:
                if nested:
                    run(*grid, stream, *head, take(pool))
                else:
                    run(*grid, stream, *head, *take(pool))
        return tuple([kept[i] for i in self.results])


class Call(NamedTuple):
    """A call that may be replayed: its key and its arguments' addresses."""

    key: Any
    pointers: list[int]

    @property
    def plan(self) -> Plan | None:
        """What replays the call; None where it must be worked out."""
        plan = _plans.get(self.key)
        return plan if isinstance(plan, Plan) and not any(plan.hooks) and not launcher.observed() else None

    def work_out(self, function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``function`` of the tensors. The call is remembered when it is seen for the second time."""
        if launcher.observed() or _capturing():  # a capture may run on configs that are not the final ones
            return function(*tensors)
        seen = _plans.get(self.key)
        if seen is None:
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[self.key] = True
        if seen is not True:
            return function(*tensors)
        # Objects of their own, even where two arguments are one tensor: arguments are told apart by identity.
        own = [t.detach() for t in tensors]
        with Recorder(own) as recorder, launcher.recording(recorder.launched):
            results = function(*own)
        _plans[self.key] = recorder.plan(results) or False
        return results


def call(tensors: Sequence[Tensor], *rest: Any) -> Call:
    """The call of a stage with these tensors, all on one CUDA device. rest: all else that it depends on, hashable.

    Equal keys mean that the same kernels are launched with the same arguments, but for addresses.
    """
    pointers = [t.data_ptr() for t in tensors]
    key = [(t.shape, t.stride(), t.dtype, t.device, p & 15) for t, p in zip(tensors, pointers, strict=True)]
    return Call((*key, rest), pointers)


def clear() -> None:
    """Forget all calls."""
    _plans.clear()


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


class _Place(NamedTuple):
    """Where a tensor lies: ``offset`` bytes into an argument, or into what the call allocated."""

    argument: bool
    index: int
    offset: int


class _Step(NamedTuple):
    bound: Bound
    grid: tuple[int, int, int]
    args: tuple[Any, ...]  # a _Place for every tensor


class Recorder(TorchDispatchMode):
    """Watches a call on these arguments."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self._arguments = {id(t): i for i, t in enumerate(arguments)}
        self._device = arguments[0].device
        self._sizes: list[int] = []  # in bytes, of every allocation
        self._storages: dict[int, int] = {}  # which allocation a storage is; an address counts for its latest owner
        self._steps: list[_Step] = []
        self._hooks: list[list[Any]] = []
        self._refused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and func._opname in _ALLOCATING and out.device == self._device:
            storage = out.untyped_storage()
            self._storages[storage._cdata] = len(self._sizes)
            self._sizes.append(storage.nbytes())
        elif not func.is_view or not _storages(out) <= _storages((args, kwargs)):  # contiguous() may copy
            self._refused = True
        return out

    def launched(self, launch: Launch) -> None:
        """Called with every launch, while its tensors are alive."""
        bound = launcher.bind(launch.compiled)
        places = tuple(self._place(x) if isinstance(x, Tensor) else x for x in launch.args)
        if bound is None or None in places or len(places) < 2:
            self._refused = True
            return
        self._hooks.append(launch.kernel.pre_run_hooks)
        self._steps.append(_Step(bound, launcher.three(launch.grid), places))

    def _place(self, t: Tensor) -> _Place | None:
        if id(t) in self._arguments:
            return _Place(True, self._arguments[id(t)], 0)
        storage = t.untyped_storage()
        index = self._storages.get(storage._cdata)
        # Not a difference of addresses: that of an empty view is zero.
        return None if index is None else _Place(False, index, int(t.storage_offset()) * t.element_size())

    def plan(self, results: Sequence[Tensor]) -> Plan | None:
        """The plan of the call with these results; None where it cannot be replayed."""
        owners = [self._whole(t) for t in results]
        if self._refused or None in owners or len(set(owners)) < len(owners):
            return None
        kinds: dict[Any, _Kind] = {o: (t.shape, t.stride(), t.dtype) for o, t in zip(owners, results, strict=True)}
        writer = _Writer(len(self._arguments), self._steps, kinds)
        phases = tuple([writer.phase(part) for part in divide(self._sizes, self._uses(), kinds, len(self._steps))])
        order = tuple([writer.kept.index(owner) for owner in owners])
        return Plan(self._device, tuple(writer.constants), phases, order, tuple(self._hooks))

    def _whole(self, t: Tensor) -> int | None:
        """The allocation that a result is, all of it and in order."""
        place = self._place(t)
        if place is None or place.argument or place.offset or not t.is_contiguous():
            return None
        return place.index if t.nbytes == self._sizes[place.index] else None

    def _uses(self) -> dict[int, tuple[int, int]]:
        """Of every allocation that a launch takes, the first and the last one that does."""
        uses: dict[int, tuple[int, int]] = {}
        for i, step in enumerate(self._steps):
            for x in step.args:
                if isinstance(x, _Place) and not x.argument:
                    uses[x.index] = (uses.get(x.index, (i, i))[0], i)
        return uses


class _Buffers(NamedTuple):
    """Offsets of allocations into one of this many bytes."""

    offsets: dict[int, int]
    size: int


class _Part(NamedTuple):
    """The allocations that launches [first, end) are the first to use. held, unlike scratch, is used later too."""

    first: int
    end: int
    results: list[int]
    held: _Buffers
    scratch: _Buffers


class _Writer:
    """Writes a plan's phases, one after the other."""

    def __init__(self, arguments: int, steps: list[_Step], kinds: dict[Any, _Kind]) -> None:
        self.constants = [x for step in steps for x in step.args if not isinstance(x, _Place)]
        self.kept: list[int | None] = []  # which allocation; None: several
        self._steps, self._kinds = steps, kinds
        self._bases = {(True, i): (i, 0) for i in range(arguments)}
        self._next = arguments
        self._addresses: dict[_Place, int] = {}  # where in the pool
        self._numbers = iter(range(len(self.constants)))

    def phase(self, part: _Part) -> Phase:
        kept = [self._kinds[i] for i in part.results]
        for i in part.results:
            self._base({i: 0})
        self.kept += part.results
        if part.held.offsets:
            kept.append(((part.held.size // 4,), (1,), torch.int32))
            self._base(part.held.offsets)
            self.kept.append(None)
        self._base(part.scratch.offsets)
        known = len(self._addresses)
        steps = [
            (bound, grid, itemgetter(*[self._position(x) for x in args]))
            for bound, grid, args in self._steps[part.first : part.end]
        ]
        cells = tuple([self._cell(place) for place in [*self._addresses][known:]])
        return Phase(tuple(kept), part.scratch.size // 4, cells, tuple(steps))

    def _base(self, offsets: dict[int, int]) -> None:
        """The next base, in which allocations lie at these offsets."""
        self._bases |= {(False, i): (self._next, low) for i, low in offsets.items()}
        self._next += 1

    def _position(self, x: Any) -> int:
        """Of an argument in the pool."""
        if not isinstance(x, _Place):
            return next(self._numbers)
        return self._addresses.setdefault(x, len(self.constants) + len(self._addresses))

    def _cell(self, place: _Place) -> tuple[int, int]:
        base, low = self._bases[place.argument, place.index]
        return base, low + place.offset


def divide(sizes: Sequence[int], uses: dict[int, tuple[int, int]], results: Collection[Any], count: int) -> list[_Part]:
    """The memory of ``count`` launches, in one part or in the two that together need least at a time."""
    ways = [_parts(sizes, uses, results, cut, count) for cut in range(max(count, 1))]
    return min(ways, key=lambda parts: _peak(parts, sizes) + WORTH * len(parts))


def _parts(
    sizes: Sequence[int], uses: dict[int, tuple[int, int]], results: Collection[Any], cut: int, count: int
) -> list[_Part]:
    parts = []
    for first, end in ((0, cut), (cut, count)) if cut else ((0, count),):
        own = {i: use for i, use in uses.items() if i not in results and first <= use[0] < end}
        held = {i: use for i, use in own.items() if use[1] >= end}
        scratch = {i: use for i, use in own.items() if use[1] < end}
        begun = [i for i in results if first <= uses.get(i, (0, 0))[0] < max(end, 1)]
        parts.append(_Part(first, end, begun, pack(sizes, held), pack(sizes, scratch)))
    return parts


def _peak(parts: list[_Part], sizes: Sequence[int]) -> int:
    kept = peak = 0
    for part in parts:
        kept += sum(_padded(sizes[i]) for i in part.results) + part.held.size
        peak = max(peak, kept + part.scratch.size)
    return peak


def pack(sizes: Sequence[int], uses: dict[int, tuple[int, int]]) -> _Buffers:
    """Offsets into one workspace for buffers of these sizes, and its size: two that are in use at the same time, from
    one launch to another, do not overlap. The largest are placed first, each as low as it fits."""
    offsets: dict[int, int] = {}
    end = 0
    for index in sorted(uses, key=lambda i: -sizes[i]):
        first, last = uses[index]
        busy = sorted(
            (offset, offset + _padded(sizes[other]))
            for other, offset in offsets.items()
            if uses[other][0] <= last and first <= uses[other][1]
        )
        start = 0
        for low, high in busy:
            if start + sizes[index] <= low:
                break
            start = max(start, high)
        offsets[index] = start
        end = max(end, start + _padded(sizes[index]))
    return _Buffers(offsets, end)


def _storages(tree: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(tree) if isinstance(t, Tensor)}


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
