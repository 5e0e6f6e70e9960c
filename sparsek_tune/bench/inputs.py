"""Inputs of a case: random, or recorded from a trained model (``examples/train_bytes.py --record``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsek_tune.bench.cases import Case
from sparsek_tune.presets import Shape
from sparsek_tune.tune.stages import DTYPES, Inputs

DEVIATION = 3.0  # of random scores: some keys saturated, some cut, some between
SLOPE = 1e-3  # of the "slope" scores over positions: old keys drain out
RECORDED = ("query", "key", "value", "scores")


class RecordingError(ValueError):
    """A file of recorded tensors that is none, or does not fit the case."""


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a recording: query [1, Hq, L, D], key, value [1, Hkv, L, D], scores [1, Hkv, L], on the CPU.

    Only tensors are unpickled, and they stay on disk until they are used. Raises RecordingError.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise RecordingError(f"{path} is no file of recorded tensors: {error}") from error
    missing = [name for name in RECORDED if not isinstance(found, dict) or not isinstance(found.get(name), Tensor)]
    if missing:
        raise RecordingError(f"{path} lacks {', '.join(missing)}: record it with examples/train_bytes.py --record")
    return {name: found[name] for name in RECORDED}


def check_recorded(recorded: dict[str, Tensor], shape: Shape) -> None:
    """Raises RecordingError where the recording has other heads, another head size or batch, or is too short."""
    q, k = recorded["query"], recorded["key"]
    shapes = {"value": list(k.shape), "scores": list(k.shape[:3])}
    for name, wanted in shapes.items():
        if list(recorded[name].shape) != wanted:
            raise RecordingError(f"recorded {name} must be {wanted}, but is {list(recorded[name].shape)}")
    has = {"b": q.shape[0], "hq": q.shape[1], "hkv": k.shape[1], "d": q.shape[3]}
    wrong = [f"{f}={x}, the shape has {f}={getattr(shape, f)}" for f, x in has.items() if x != getattr(shape, f)]
    if q.shape[2] < shape.n:
        wrong.append(f"n={q.shape[2]}, the shape needs n={shape.n}")
    if wrong:
        raise RecordingError(f"the recording does not fit: it has {'; '.join(wrong)}")


def make(case: Case, seed: int, device: str, recorded: dict[str, Tensor] | None = None) -> Inputs:
    """The tensors of a case on ``device``, stored [B, N, H, D] and seen as [B, H, N, D], as models have them.

    The budget and the window are cut to the length. Query, key and value of "iid" and "slope" are the same for a seed.
    recorded: for "trained", of which the first n positions are taken. Raises RecordingError.
    """
    s, generator = case.shape, torch.Generator(device).manual_seed(seed)

    def heads(count: int) -> Tensor:
        shape = (s.b, s.n, count, s.d)
        return torch.randn(shape, dtype=DTYPES[s.dtype], device=device, generator=generator).transpose(1, 2)

    q, k, v, dout = heads(s.hq), heads(s.hkv), heads(s.hkv), heads(s.hq)
    u = torch.randn((s.b, s.hkv, s.n), device=device, generator=generator) * DEVIATION
    if case.distribution == "slope":
        u += SLOPE * torch.arange(s.n, device=device)
    elif case.distribution == "trained":
        if recorded is None:
            raise RecordingError("the distribution 'trained' needs a recording")
        check_recorded(recorded, s)
        q, k, v = (_stored(recorded[name][:, :, : s.n], DTYPES[s.dtype], device) for name in RECORDED[:3])
        u = recorded["scores"][:, :, : s.n].to(device, torch.float32).contiguous()
    return Inputs(q, k, v, u, dout, min(s.k, s.n), min(s.w, s.n), s.d**-0.5, s.gate)


def _stored(t: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """[B, H, N, D] as a view of a contiguous [B, N, H, D]."""
    return t.to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2)


def shorter(i: Inputs, n: int) -> Inputs:
    """The first ``n`` positions of the inputs (views)."""
    q, k, v, dout = (t[:, :, :n] for t in (i.query, i.key, i.value, i.dout))
    return Inputs(q, k, v, i.scores[:, :, :n], dout, min(i.k, n), min(i.window, n), i.scale, i.gate)
