"""Calls that differ from an earlier one in nothing but addresses and numbers in memory are replayed.

What a stage launches follows from shapes, strides, dtypes, alignment and options alone (``launch``). So the second call
of a kind is recorded: which tensors it allocated, and which kernels it launched with which arguments. From then on such
a call is a table: allocate the results and one workspace, and launch each kernel with the addresses filled in. That
takes a few microseconds a launch, where working everything out anew takes ten times that.

A call is replayed only where all that the recorded one depended on is equal, its arguments' validity included, and
where nothing observes launches (``launcher.observed``). A call that did anything but allocate, take views and launch is
never replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

_ALLOCATING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_plans: dict[Any, Plan | bool] = {}  # True: seen once; False: cannot be replayed


class Plan(NamedTuple):
    """A recorded call. results: shape and dtype of each; cells: (base, offset) of every address, a base being an
    argument, a result or the workspace, in this order; constants: every other argument of a launch; steps: the
    launches, each taking its arguments out of addresses and constants by position."""

    device: torch.device
    results: tuple[tuple[torch.Size, torch.dtype], ...]
    workspace: int  # int32 elements
    cells: tuple[tuple[int, int], ...]
    constants: tuple[Any, ...]
    steps: tuple[tuple[Bound, tuple[int, int, int], Callable[[Any], tuple[Any, ...]]], ...]
    hooks: tuple[list[Any], ...]  # of the kernels; all empty when recorded

    def __call__(self, pointers: Sequence[int]) -> tuple[Tensor, ...]:
        """The call with arguments at these addresses, on the current stream of the current device."""
        device = self.device
        results = tuple([torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results])
        bases = [*pointers, *[t.data_ptr() for t in results]]
        if self.workspace:
            workspace = torch.empty(self.workspace, dtype=torch.int32, device=device)
            bases.append(workspace.data_ptr())
        pool = [*[bases[base] + offset for base, offset in self.cells], *self.constants]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        for (run, head, nested, _), grid, take in self.steps:
            if nested:
                run(*grid, stream, *head, take(pool))
            else:
                run(*grid, stream, *head, *take(pool))
        return results


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
        bases = {(False, index): len(self._arguments) + i for i, index in enumerate(owners)}
        bases |= {(True, i): i for i in range(len(self._arguments))}
        offsets, workspace = pack(self._sizes, self._uses(set(owners)))
        own = len(self._arguments) + len(owners)

        def cell(p: _Place) -> tuple[int, int]:
            base = bases.get((p.argument, p.index))
            return (own, offsets[p.index] + p.offset) if base is None else (base, p.offset)

        places = dict.fromkeys(x for step in self._steps for x in step.args if isinstance(x, _Place))
        where = {p: i for i, p in enumerate(places)}
        constants: list[Any] = []
        steps = []
        for bound, grid, args in self._steps:
            at = []
            for x in args:
                if isinstance(x, _Place):
                    at.append(where[x])
                else:
                    at.append(len(where) + len(constants))
                    constants.append(x)
            steps.append((bound, grid, itemgetter(*at)))
        kinds = tuple((t.shape, t.dtype) for t in results)
        cells = tuple(map(cell, places))
        return Plan(self._device, kinds, workspace // 4, cells, tuple(constants), tuple(steps), tuple(self._hooks))

    def _whole(self, t: Tensor) -> int | None:
        """The allocation that a result is, all of it and in order."""
        place = self._place(t)
        if place is None or place.argument or place.offset or not t.is_contiguous():
            return None
        return place.index if t.nbytes == self._sizes[place.index] else None

    def _uses(self, results: set[int | None]) -> dict[int, tuple[int, int]]:
        """Of every allocation that is no result, the first and the last launch that takes it."""
        uses: dict[int, tuple[int, int]] = {}
        for i, step in enumerate(self._steps):
            for x in step.args:
                if isinstance(x, _Place) and not x.argument and x.index not in results:
                    uses[x.index] = (uses.get(x.index, (i, i))[0], i)
        return uses


def pack(sizes: Sequence[int], uses: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
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
    return offsets, end


def _storages(tree: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(tree) if isinstance(t, Tensor)}


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
