"""What is measured: shapes, distributions of the scores, names of peers, and the arithmetic that counts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sparsek_tune.presets import MODELS, Shape
from sparsek_tune.presets import shapes as all_shapes

DISTRIBUTIONS = ("iid", "slope", "trained")
PEERS = ("cudnn", "flash", "flex", "nsa", "adasplash")
STAGES = ("threshold", "schedule", "forward", "dq", "dkv")
BACKWARD_FLOPS = 2.5  # five matrix products where forward has two

# (n, k, w): the crossover with dense attention, then long sequences, then the same number of keys with a window.
LENGTHS = (
    (4096, 512, 0), (8192, 512, 0), (16384, 1024, 0), (32768, 1024, 0), (65536, 1024, 0), (131072, 1024, 0),
    (65536, 512, 512),
)  # fmt: skip


class Case(NamedTuple):
    """One measurement: exact sizes and the distribution of the scores (one of DISTRIBUTIONS)."""

    shape: Shape
    distribution: str

    def __str__(self) -> str:
        s = self.shape
        others = [f"{f}={getattr(s, f)}" for f in ("hq", "hkv", "d", "b", "dtype", "gate") if self.differs(f)]
        return " ".join((f"n={s.n} k={s.k} w={s.w}", *others, self.distribution))

    def differs(self, field: str) -> bool:
        """Whether a field of the shape is not its default."""
        return getattr(self.shape, field) != getattr(Shape(), field)


def case_of(entry: Mapping[str, Any]) -> Case:
    """The case that an entry of the document tells of."""
    return Case(Shape(**entry["problem"]), entry["distribution"])


def cases(models: tuple[str, ...], texts: tuple[str, ...], distributions: tuple[str, ...]) -> list[Case]:
    """Every shape under every distribution. Without ``--shape`` each model (or the default heads) runs at LENGTHS.

    Raises ValueError for a shape that is none.
    """
    if texts:
        found = all_shapes(models, texts)
    else:
        bases = [Shape(hq=hq, hkv=hkv, d=d) for hq, hkv, d in (MODELS[m] for m in models)] or [Shape()]
        found = [replace(base, n=n, k=k, w=w) for base in dict.fromkeys(bases) for n, k, w in LENGTHS]
    return [Case(shape, name) for shape in found for name in dict.fromkeys(distributions)]


def attended(n: int, k: int, w: int) -> int:
    """The number of (query, key) pairs of one head: the sum over queries of window keys and selected keys."""
    w = min(w, n)
    m = n - w  # queries with a candidate; the t-th of them has t candidates
    k = min(k, m)
    return _rising(n, w) + _rising(m, k)


def _rising(count: int, most: int) -> int:
    """min(1, most) + min(2, most) + ... + min(count, most)."""
    return most * (most + 1) // 2 + (count - most) * most


def forward_flops(shape: Shape) -> int:
    """FLOPs of the forward pass on attended pairs: 4 D for each and query head; the selection multiplies nothing."""
    return 4 * shape.d * shape.hq * shape.b * attended(shape.n, shape.k, shape.w)
