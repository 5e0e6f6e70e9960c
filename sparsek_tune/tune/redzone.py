"""What a candidate does to memory: poison, redzones and fingerprints.

    with redzones() as zones:
        results = run()
    zones.check(results)  # raises MemoryCorrupted

On a GPU a write out of bounds raises nothing as long as something is allocated there. It damages whatever that is: the
buffers of others, the references that judge later candidates, in a program the model.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsek_tune import launch

SIZE = 1 << 20  # bytes of a redzone
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_WORDS = 1 << 23  # that are fingerprinted at a time
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # spreads the bits of an index


class MemoryCorrupted(Exception):
    """A candidate wrote where it must not. The process that it ran in cannot be trusted any more."""


class _Buffer(NamedTuple):
    """The memory of a tensor, from ``first`` to ``last``, between redzones that hold ``pattern``; all in elements."""

    memory: Tensor
    first: int
    last: int
    pattern: int
    origin: str

    def damage(self) -> str | None:
        before, after = self.memory[: self.first], self.memory[self.last :]
        places = ("before its start", before), ("after its end", after)
        found = [words for words, zone in places if bool((zone != self.pattern).any())]
        return " and ".join(found) or None

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.first * self.memory.element_size()


class Redzones:
    """The buffers that were made in a block of :func:`redzones`."""

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []

    def check(self, results: Mapping[str, Tensor]) -> None:
        """Raise MemoryCorrupted where a redzone was written. results: those of the buffers that have a name."""
        names = {t.data_ptr(): name for name, t in results.items()}
        found = [(names.get(b.address, b.origin), b.damage()) for b in self._buffers]
        if bad := [f"{name}: written {where}" for name, where in found if where]:
            raise MemoryCorrupted("; ".join(bad))

    def make(self, like: Tensor, device: torch.device, size: int) -> Tensor:
        """A poisoned tensor on ``device``, laid out as ``like``, between redzones of ``size`` bytes."""
        bits = _BITS[like.element_size()]
        count, zone = like.untyped_storage().nbytes() // like.element_size(), size // like.element_size()
        # A NaN that no arithmetic gives, or an index far out of range; neither is what poisoned tensors hold.
        pattern = -1 if like.dtype.is_floating_point else torch.iinfo(bits).min // 2 + 5
        memory = torch.full((zone + count + zone,), pattern, dtype=bits, device=device)
        self._buffers.append(_Buffer(memory, zone, zone + count, pattern, _origin(like)))
        return _poison(memory[zone : zone + count].view(like.dtype).as_strided(like.shape, like.stride(), zone))


@contextlib.contextmanager
def redzones(size: int = SIZE) -> Iterator[Redzones]:
    """Within the block new uninitialised tensors are poisoned: NaN, or an index far out of range. What a kernel forgets
    to write, or reads before it is written, shows. Each lies between redzones of ``size`` bytes (a multiple of 512),
    poisoned too, those that ``launch`` carves from one allocation each by itself; all are kept as long as the Redzones.
    size 0: poison alone, and nothing is kept."""
    zones = Redzones()
    patched = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in [*patched, (launch, "_carve")]]

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            like = original(*args, **{**kwargs, "device": "meta"})
            if size and like.numel():
                return zones.make(like, _device(args, kwargs), size)
            return _poison(original(*args, **kwargs))

        return make

    def carve(like: Tensor, dtype: torch.dtype, *sizes: int) -> list[Tensor]:
        return [like.new_empty(-(-count // 64) * 64, dtype=dtype) for count in sizes]

    try:
        for owner, name, original in originals[:-1]:
            setattr(owner, name, poisoned(original))
        if size:
            launch._carve = carve
        yield zones
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    if (chosen := kwargs.get("device")) is not None:
        return torch.device(chosen)
    return args[0].device if args and isinstance(args[0], Tensor) else torch.get_default_device()


def _poison(t: Tensor) -> Tensor:
    if t.dtype.is_floating_point:
        return t.fill_(float("nan"))
    return t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).min // 2)


def _origin(like: Tensor) -> str:
    """Where a tensor is being made, to name it by."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    file = os.path.basename(frame.f_code.co_filename)
    return f"{str(like.dtype).removeprefix('torch.')}{list(like.shape)} made in {file}:{frame.f_lineno}"


class Fingerprint:
    """Of all bytes of the storages that named tensors lie in, with redzones around them: to see whether they change."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors = list({t.untyped_storage().data_ptr(): (name, t) for name, t in tensors}.values())
        self._before = self._take()

    def check(self) -> None:
        """Raise MemoryCorrupted where a tensor, or the memory beside it, is not what it was."""
        now = self._take()
        bad = [name for (name, _), a, b in zip(self._tensors, self._before, now, strict=True) if a != b]
        if bad:
            raise MemoryCorrupted(f"written though only read, or beside it: {', '.join(bad)}")

    def _take(self) -> list[int]:
        return torch.stack([_hash(t) for _, t in self._tensors]).tolist() if self._tensors else []


def _hash(t: Tensor) -> Tensor:
    """64 bits of the storage of ``t``: a sum of its words, each times an odd number of its own, so that no change of a
    single word goes unseen."""
    data = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
    whole = data.numel() // 8 * 8
    words, total = data[:whole].view(torch.int64), data[whole:].sum(dtype=torch.int64)
    for start in range(0, len(words), _WORDS):
        part = words[start : start + _WORDS]
        total = total + (part * (torch.arange(start, start + len(part), device=t.device) * _ODD | 1)).sum()
    return total
