"""What a kernel template is: a search space, its constraints, a cost model and a safe default.

A template file holds its Triton kernels and ends in one :class:`Template`. Nothing here imports torch or triton,
so that the dispatcher and the database can speak of configs without a GPU stack.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsek_tune.problem import Device, Problem

Value = int | str | bool


class Config(dict[str, Value]):
    """One point of a search space: parameter name to value. Hashable by content; treat it as immutable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.key)

    @cached_property
    def key(self) -> str:
        """Canonical JSON text: equal configs have equal keys, on every machine."""
        return json.dumps(self, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_key(cls, key: str) -> Config:
        return cls(json.loads(key))


@dataclass(frozen=True)
class Pow2:
    """The powers of two from ``low`` to ``high``, both included; searched by exponent."""

    low: int
    high: int

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(1 << e for e in range(self.low.bit_length() - 1, self.high.bit_length()))


@dataclass(frozen=True)
class Choice:
    """An unordered (or irregular) set of values."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Param:
    """One tunable. ``when`` says, from the parameters before it, whether it matters; if not, it is its first."""

    name: str
    domain: Pow2 | Choice
    when: Callable[[Mapping[str, Value]], bool] | None = None

    def values(self, chosen: Mapping[str, Value]) -> tuple[Value, ...]:
        values = self.domain.values
        return values if self.when is None or self.when(chosen) else values[:1]


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations, bytes through device memory, kernel launches."""

    flops: float
    bytes: float
    launches: int = 1

    def seconds(self, peak_flops: float, peak_bytes: float) -> float:
        """Roofline time (s) at ``peak_flops`` (1/s) and ``peak_bytes`` (B/s), plus 3 us a launch."""
        return max(self.flops / peak_flops, self.bytes / peak_bytes) + 3e-6 * self.launches


def _is_one_of(x: Any, values: tuple[Value, ...]) -> bool:
    """Whether ``x`` is among ``values``, where True is not 1."""
    return any(x == v and type(x) is type(v) for v in values)


@dataclass(frozen=True)
class Template:
    """A kernel family.

    name: stable identifier, part of every database key.
    fields: the :class:`Problem` fields that the kernel depends on; the others are dropped from its key.
    space: the tunables, in order (a condition may look at those before it).
    default: a config that is valid for every problem on every supported GPU.
    check: why a config cannot run (shared memory, tile shape, ...), or None where it can.
    cost: the cost model of one call.
    sources: files whose text decides the behaviour; their hash keys all measurements.
    """

    name: str
    fields: frozenset[str]
    space: tuple[Param, ...]
    default: Callable[[Problem, Device], Config]
    check: Callable[[Config, Problem, Device], str | None]
    cost: Callable[[Config, Problem], Cost]
    sources: tuple[str, ...] = field(repr=False)

    def configs(self) -> Iterator[Config]:
        """Every point of the space, in a fixed order, conditions applied, constraints not."""

        def extend(chosen: dict[str, Value], rest: tuple[Param, ...]) -> Iterator[Config]:
            if not rest:
                yield Config(chosen)
                return
            for value in rest[0].values(chosen):
                yield from extend({**chosen, rest[0].name: value}, rest[1:])

        return extend({}, self.space)

    def feasible(self, problem: Problem, device: Device) -> Iterator[Config]:
        """The points of the space that pass ``check``."""
        return (c for c in self.configs() if self.check(c, problem, device) is None)

    def contains(self, config: Mapping[str, Any]) -> bool:
        """Whether ``config`` names exactly this space's parameters with allowed values."""
        if set(config) != {p.name for p in self.space}:
            return False
        return all(_is_one_of(config[p.name], p.domain.values) for p in self.space)

    @cached_property
    def source_hash(self) -> str:
        """Hash of the sources' text: the same from a wheel, a checkout, and on every platform."""
        digest = hashlib.sha256()
        for path in self.sources:
            text = Path(path).read_text(encoding="utf-8").replace("\r\n", "\n")
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()[:16]

    @cached_property
    def size(self) -> int:
        """Number of points of the space, constraints not applied."""
        return sum(1 for _ in itertools.islice(self.configs(), 1_000_000))


def next_pow2(n: int) -> int:
    """The least power of two that is not below ``n`` (1 for n < 1)."""
    return 1 << max(0, n - 1).bit_length()


DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
