"""What is tuned for (:class:`Problem`) and on what (:class:`Device`). Standard library only, but to look at a GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

GATES = ("kv", "v", "none")
DTYPES = ("bf16", "fp16", "fp32")


class Problem(NamedTuple):
    """A shape class of the operator, the unit of tuning and of lookup.

    dtype: of query, key and value ("bf16", "fp16", "fp32"); d: head size; g: query heads per KV head;
    gate: "kv", "v" or "none"; k: budget; w: window; n: length, rounded up to a power of two;
    rows: batch times KV heads, rounded up to a power of two.
    """

    dtype: str
    d: int
    g: int
    gate: str
    k: int
    w: int
    n: int
    rows: int

    @classmethod
    def of(cls, dtype: str, d: int, g: int, gate: str, k: int, w: int, n: int, rows: int) -> Problem:
        """The problem that a call with exact length ``n`` and exact ``rows`` belongs to."""
        return cls(dtype, d, g, gate, k, w, 1 << (n - 1).bit_length(), 1 << (rows - 1).bit_length())

    def project(self, fields: frozenset[str]) -> Problem:
        """This problem with every field outside ``fields`` blanked, so that it never splits a key."""
        unused = {f: "" if isinstance(v, str) else 0 for f, v in self._asdict().items() if f not in fields}
        return self._replace(**unused)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return " ".join(f"{f}={v}" for f, v in zip(self._fields, self, strict=True) if v not in ("", 0) or f == "w")


@dataclass(frozen=True)
class Device:
    """Fingerprint of a GPU and the software that drives it.

    kind and cc (compute capability times ten: 90 for Hopper) are hard: a config serves no other. The rest are soft:
    they grade a match. smem: shared memory a program may take (bytes); l2, memory: bytes.
    """

    kind: str
    cc: int
    name: str
    sm_count: int
    smem: int
    l2: int = 0
    memory: int = 0
    driver: str = ""
    cuda: str = ""
    triton: str = ""
    torch: str = ""

    @property
    def static(self) -> bool:
        """Whether this is a named target without a GPU behind it."""
        return self.name.startswith("target ")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Shared memory per program (bytes), SM count and L2 (bytes) of the GPUs that a target names (CUDA C Programming Guide,
# "Technical Specifications per Compute Capability"; SM and L2 of A100, L4, H100 SXM, B200, RTX 5090).
_TARGETS = {
    80: (166912, 108, 40 << 20),
    86: (101376, 84, 6 << 20),
    89: (101376, 58, 48 << 20),
    90: (232448, 132, 50 << 20),
    100: (232448, 148, 126 << 20),
    120: (101376, 170, 96 << 20),
}
TARGETS = tuple(f"cuda:{cc}" for cc in _TARGETS)


def target_device(target: str) -> Device:
    """The device that ``target`` ("cuda:90") names, without looking at any GPU. Raises ValueError if unknown."""
    kind, _, arch = target.partition(":")
    if kind != "cuda" or not arch.isdigit() or int(arch) not in _TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, but is {target!r}")
    smem, sms, l2 = _TARGETS[int(arch)]
    triton, torch = _versions()
    return Device("cuda", int(arch), f"target {target}", sms, smem, l2, triton=triton, torch=torch)


def current_device(index: int = 0) -> Device:
    """The fingerprint of CUDA device ``index``. Raises RuntimeError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is available")
    p = torch.cuda.get_device_properties(index)
    smem = getattr(p, "shared_memory_per_block_optin", 0) or _TARGETS.get(p.major * 10 + p.minor, (101376, 0, 0))[0]
    triton, torch_version = _versions()
    return Device(
        kind="cuda",
        cc=p.major * 10 + p.minor,
        name=p.name,
        sm_count=p.multi_processor_count,
        smem=smem,
        l2=getattr(p, "L2_cache_size", 0),
        memory=p.total_memory,
        driver=_driver_version(),
        cuda=torch.version.cuda or "",
        triton=triton,
        torch=torch_version,
    )


def _versions() -> tuple[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    def get(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    return get("triton"), get("torch")


def _driver_version() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as f:
            words = f.readline().split()
        return next((w for w in words if w[0].isdigit() and "." in w), "")
    except OSError:
        return ""
