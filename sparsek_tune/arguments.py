"""What the operators accept. Every check names the argument, what it was and what is allowed, and launches nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .kernel_templates.base import next_pow2
from .limits import GROUP_MAX, HEAD_MAX, INT_MAX, LENGTH_MAX, QUERY_BYTES_MAX, ROWS_MAX, query_bytes
from .problem import GATES

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

MOST_PASSED = 4096
_passed: set[Any] = set()  # every property that check_attention looks at, of arguments that passed it


def compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype that ``t`` is computed in: autocast's where it is on (it leaves float64 alone)."""
    if not torch._C._is_any_autocast_enabled():
        return t.dtype
    kind = t.device.type
    if t.dtype != torch.float64 and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return t.dtype


def autocast_dtypes(tensors: Iterable[Tensor]) -> tuple[torch.dtype, ...] | None:
    """The dtypes that autocast has these computed in; None where no autocast is on."""
    return tuple(map(compute_dtype, tensors)) if torch._C._is_any_autocast_enabled() else None


def check_projection(z: Tensor, k: int, dim: int) -> None:
    """Arguments of ``sparsek``."""
    _check_tensor("z", z)
    _check_int("k", k, 1)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, but is {dim!r} of type {type(dim).__name__}")
    if not -z.dim() <= dim < z.dim():
        raise ValueError(f"dim must be in [{-z.dim()}, {z.dim()}) for z of shape {list(z.shape)}, but is {dim}")


def check_select(scores: Tensor, k: int, window: int) -> None:
    """Arguments of ``sparsek_select``."""
    _check_tensor("scores", scores)
    if scores.dim() != 3 or 0 in scores.shape:
        raise ValueError(f"scores must be [B, Hkv, N], no size 0, but is of shape {list(scores.shape)}")
    _check_dtype("scores", scores.dtype, scores.device.type == "cpu")
    _check_extent("scores", scores.shape[0] * scores.shape[1], scores.shape[2], scores.device.type)
    _check_int("k", k, 1)
    _check_int("window", window, 0)


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, k: int, window: int, scale: float | None, gate: str
) -> None:
    """Arguments of ``sparsek_attention``. What has passed once passes again without a look at each condition."""
    try:
        tensors = query, key, value, scores
        of = tuple([(t.shape, t.dtype, t.device) for t in tensors])
        seen = of, autocast_dtypes(tensors), k, type(k), window, type(window), scale, type(scale), gate
        if seen in _passed:
            return
    except (AttributeError, TypeError):  # no tensors, or sizes that are symbols, which have no hash
        seen = None
    _check_attention(query, key, value, scores, k, window, scale, gate)
    if seen is not None:
        if len(_passed) >= MOST_PASSED:
            _passed.clear()
        _passed.add(seen)


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, k: int, window: int, scale: float | None, gate: str
) -> None:
    for name, t in (("query", query), ("key", key), ("value", value), ("scores", scores)):
        _check_tensor(name, t)
        if t.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, but is on {t.device}")
    _check_shapes(query, key, value, scores)
    _check_dtypes(query, key, value, scores)
    _check_int("k", k, 1)
    _check_int("window", window, 0)
    if scale is not None:
        _check_scale(scale)
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, but is {gate!r}")


def check_gradient(dout: Tensor, query: Tensor) -> None:
    """The output's gradient, in the backward op."""
    _check_shape("dout", dout, tuple(query.shape), "[B, Hq, N, D]")
    if dout.device != query.device or dout.dtype != query.dtype:
        raise ValueError(f"dout must be {query.dtype} on {query.device} as query, but is {dout.dtype} on {dout.device}")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> None:
    if query.dim() != 4 or 0 in query.shape:
        raise ValueError(f"query must be [B, Hq, N, D], no size 0, but is of shape {list(query.shape)}")
    batch, heads, n, d = query.shape
    if key.dim() != 4 or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"key must be [B, Hkv, N, D] with Hkv a divisor of query's Hq = {heads}, but is of shape {list(key.shape)}"
        )
    kv_heads = key.shape[1]
    _check_shape("key", key, (batch, kv_heads, n, d), "[B, Hkv, N, D]")
    _check_shape("value", value, (batch, kv_heads, n, d), "[B, Hkv, N, D]")
    _check_shape("scores", scores, (batch, kv_heads, n), "[B, Hkv, N]")
    kind = query.device.type
    if kind != "cpu" and d > HEAD_MAX:
        raise ValueError(f"query must have a head size D in [1, {HEAD_MAX}] on {kind}, but D is {d}")
    if kind != "cpu" and heads // kv_heads > GROUP_MAX:
        raise ValueError(
            f"query must have at most {GROUP_MAX} heads per KV head on {kind}, but has {heads} for {kv_heads}"
        )
    size = query_bytes(heads // kv_heads, d, compute_dtype(query).itemsize)
    if kind != "cpu" and size > QUERY_BYTES_MAX:
        most = next_pow2(heads // kv_heads) * QUERY_BYTES_MAX // size
        raise ValueError(
            f"query must have at most {most} heads per KV head at D {d} and {compute_dtype(query)} on {kind}, "
            f"but has {heads} for {kv_heads}"
        )
    _check_extent("query", batch * kv_heads, n, kind)


def _check_extent(name: str, rows: int, n: int, kind: str) -> None:
    if kind != "cpu" and rows > ROWS_MAX:
        raise ValueError(f"{name} must have at most {ROWS_MAX} batches times KV heads on {kind}, but has {rows}")
    if kind != "cpu" and n > LENGTH_MAX:
        raise ValueError(f"{name} must have a length of at most {LENGTH_MAX} on {kind}, but has {n}")


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> None:
    dtype = compute_dtype(query)
    _check_dtype("query", dtype, query.device.type == "cpu")
    for name, t in (("key", key), ("value", value)):
        if compute_dtype(t) != dtype:
            raise TypeError(f"{name} must have query's dtype {dtype}, but is {compute_dtype(t)}")
    if scores.dtype == torch.float64 and dtype != torch.float64:
        raise TypeError(f"scores must be float32, float16 or bfloat16 beside a {dtype} query, but is {scores.dtype}")
    _check_dtype("scores", scores.dtype, True)


def _check_dtype(name: str, dtype: torch.dtype, double: bool) -> None:
    if dtype not in DTYPE_NAMES or (dtype == torch.float64 and not double):
        raise TypeError(f"{name} must be float32, float16 or bfloat16 (float64 on the CPU only), but is {dtype}")


def _check_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is {type(t).__name__}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, but is {t.dtype}")


def _check_int(name: str, x: Any, low: int) -> None:
    if not isinstance(x, (int, torch.SymInt)) or isinstance(x, bool):
        raise TypeError(f"{name} must be an int, but is {x!r} of type {type(x).__name__}")
    if not low <= x <= INT_MAX:
        raise ValueError(f"{name} must be in [{low}, {INT_MAX}], but is {x}")


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...], names: str) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must be of shape {names} = {list(shape)}, but is {list(t.shape)}")


def _check_scale(scale: Any) -> None:
    if not isinstance(scale, (int, float, torch.SymFloat)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a float or None, but is {scale!r} of type {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, but is {scale}")
