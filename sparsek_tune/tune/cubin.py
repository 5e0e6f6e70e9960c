"""What a compiled CUDA kernel takes, read from its ELF file without a tool of CUDA, and whether a GPU has it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sparsek_tune.problem import Device
from sparsek_tune.tune.types import Kernel

MOST_STACK = 512  # bytes a thread; a kernel that spills more has never been the fastest, and may take ptxas minutes
REGISTERS = 65536  # per SM, on every CUDA device since compute capability 3.5
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NVAL_SIZED = 4  # an attribute whose value follows, with its size in the header
_REGCOUNT, _FRAME_SIZE = 0x2F, 0x11  # EIATTR codes of .nv.info; each value is (symbol, number)


class Resources(NamedTuple):
    """registers: 32-bit registers a thread; stack: bytes a thread in local memory (spills and local arrays)."""

    registers: int
    stack: int


def resources(cubin: bytes) -> Resources:
    """The resources of the largest kernel in ``cubin`` (Triton puts one there). Raises ValueError for anything else."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("cubin is not a 64-bit ELF file")
    try:
        found = _numbers(cubin)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise ValueError(f"cubin is damaged: {error}") from None
    if _REGCOUNT not in found:
        raise ValueError("cubin holds no kernel: no register count in .nv.info")
    return Resources(found[_REGCOUNT], found.get(_FRAME_SIZE, 0))


def infeasible(kernels: Sequence[Kernel], device: Device) -> str | None:
    """Why a candidate with these kernels is not worth a launch on ``device``, or None."""
    for k in kernels:
        if k.shared > device.smem:
            return f"{k.name}: shared memory of {k.shared} bytes, {device.smem} available"
        if k.stack > MOST_STACK:
            return f"{k.name}: spills, stack of {k.stack} bytes a thread, at most {MOST_STACK} accepted"
        if k.registers * 32 * k.warps > REGISTERS:
            return f"{k.name}: {k.registers} registers a thread with {k.warps} warps, {REGISTERS} an SM"
    return None


def _numbers(cubin: bytes) -> dict[int, int]:
    """Attribute code to its largest number, over all .nv.info sections."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [_SECTION.unpack_from(cubin, table + i * size) for i in range(count)]
    names = sections[names_index][4]
    found: dict[int, int] = {}
    for name, _, _, _, offset, length, *_ in sections:
        start = names + name
        if cubin[start : cubin.index(b"\0", start)] == b".nv.info":
            for code, number in _attributes(cubin[offset : offset + length]):
                found[code] = max(number, found.get(code, 0))
    return found


def _attributes(data: bytes) -> Iterator[tuple[int, int]]:
    """(code, number) of every sized attribute that is a (symbol, number) pair."""
    at = 0
    while at + 4 <= len(data):
        kind, code, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == _NVAL_SIZED:
            if value >= 8:
                yield code, struct.unpack_from("<II", data, at)[1]
            at += value
