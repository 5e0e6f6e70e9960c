"""What the kernels take at most. Standard library only."""

from __future__ import annotations

from sparsek_tune.kernel_templates.base import DTYPE_BYTES, next_pow2

INT_MAX = 2**31 - 1  # positions are int32
HEAD_MAX = 256  # what a tile of the kernels holds
GROUP_MAX = 64  # query heads per KV head: a tile holds all of them for one query
QUERY_BYTES_MAX = 32768  # ... in the shared memory of the smallest supported GPU, sizes rounded up to powers of two
ROWS_MAX = 65535  # batch x KV heads: CUDA's limit for the second and third axis of a grid
LENGTH_MAX = 2**29  # positions times four are int32


def query_bytes(group: int, d: int, itemsize: int) -> int:
    """What the ``group`` query heads of one KV head take in a kernel's tile for one query."""
    return next_pow2(group) * next_pow2(d) * itemsize


def group_max(d: int, dtype: str) -> int:
    """The most query heads per KV head, at head size ``d`` in ``dtype`` ("bf16", "fp16", "fp32")."""
    return min(GROUP_MAX, QUERY_BYTES_MAX // query_bytes(1, d, DTYPE_BYTES[dtype]))
