"""The public operators, and their registration with PyTorch as ``torch.ops.sparsek.*``.

The registered ops are opaque to the compiler, and the config of each kernel is looked up inside them, on real tensors:
one compiled graph serves every length and every config. Gradients come from one ``autograd.Function`` outside of the
ops, so that activation checkpointing policies, FLOP counters and ``torch.export`` see the ops by name.

CUDA tensors run the Triton kernels, CPU tensors ``sparsek_tune.reference``. Where Triton's interpreter is active
(``TRITON_INTERPRET=1``), float32 and float16 on the CPU run the kernels in it; bfloat16 and float64 it lacks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._triton import has_triton_package
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import captured, reference
from .arguments import (
    DTYPE_NAMES,
    autocast_dtypes,
    check_attention,
    check_gradient,
    check_projection,
    check_select,
    compute_dtype,
)
from .context import transformed, unseen
from .flops import attention_flops, backward_flops
from .problem import Problem, target_device
from .reference import Selection

__all__ = ["problem_of", "sparsek", "sparsek_attention", "sparsek_select"]


def sparsek(z: Tensor, k: int, dim: int = -1) -> Tensor:
    """Projection of ``z`` on ``{p : 0 <= p <= 1, sum(p) = k}`` along ``dim``: ``clip(z - tau, 0, 1)``.

    z: floating point, any shape and device. k: an int >= 1; where it is not below the size of ``dim`` the result is all
    ones. Returns a tensor like ``z``; differentiable. Raises TypeError or ValueError for invalid arguments.
    """
    if not torch.compiler.is_compiling():
        check_projection(z, k, dim)
    return reference.sparsek(z, k, dim)


def sparsek_select(scores: Tensor, k: int, *, window: int = 0) -> tuple[Tensor, Tensor]:
    """The selection that causal SparseK attention makes from ``scores``.

    scores: [B, Hkv, N]; float32 (float16 and bfloat16 are converted), or float64 on the CPU. k: budget, an int >= 1,
    may exceed N. window: an int >= 0.

    Returns ``tau`` [B, Hkv, N] float32 (float64 for float64 scores), the threshold by query, and ``expiry`` [B, Hkv, N]
    int32 by key: key j is selected by exactly the queries ``[j + window, expiry_j)``. Neither is differentiable.
    Scores that are NaN give an unspecified selection. Raises TypeError or ValueError for invalid arguments.
    """
    if not torch.compiler.is_compiling():
        check_select(scores, k, window)
    tau, expiry, *_ = SELECT(scores.detach(), k, window)
    return tau, expiry


def sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    k: int,
    *,
    window: int = 0,
    scale: float | None = None,
    gate: str = "kv",
) -> Tensor:
    """Causal attention of every query over its last ``window`` keys and ``k`` keys selected by score before them.

    query: [B, Hq, N, D]; key, value: [B, Hkv, N, D], Hq a multiple of Hkv; one dtype: float32, float16 or bfloat16, or
    float64 on the CPU. Any strides; only a last dimension that is not contiguous is copied. On CUDA, D <= 256.
    scores: [B, Hkv, N], one per key and KV head; float32 (float16 and bfloat16 are converted, float64 only beside
    float64 queries). k: budget, an int >= 1, may exceed N. window: an int >= 0.
    scale: of the logits, D ** -0.5 where None. gate: what the gates ``clip(scores - tau, 0, 1)`` of the selected keys
    multiply: "kv" keys and values, "v" values, "none" nothing (then the scores get no gradient).

    Returns [B, Hq, N, D], contiguous, in the query's dtype; differentiable once in query, key, value and scores. Under
    autocast query, key and value are cast, scores are not. Results and gradients are the same, bit for bit, from run to
    run. Scores that are NaN give unspecified results. Raises TypeError or ValueError for invalid arguments.
    """
    if not torch.compiler.is_compiling():
        check_attention(query, key, value, scores, k, window, scale, gate)
    dtype = compute_dtype(query)
    if not query.dtype == key.dtype == value.dtype == dtype:
        query, key, value = (t.to(compute_dtype(t)) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    args = query, key, value, scores, k, window, scale, gate
    if transformed():
        return _Attention.apply(*args)[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, scores)):
        return _EagerAttention.apply(*args)
    return (_attention(*args, wanted=1) if unseen(*args[:4]) else ATTENTION(*args))[0]


def problem_of(query: Tensor, key: Tensor, k: int, window: int, gate: str) -> Problem:
    """The tuning problem that :func:`sparsek_attention` looks up for these arguments."""
    batch, heads, n, d = query.shape
    kv_heads = key.shape[1]
    return Problem.of(DTYPE_NAMES[query.dtype], d, heads // kv_heads, gate, k, window, n, batch * kv_heads)


# ---------------------------------------------------------------------------------------------------------------------
# Schemas. Exact strides: the kernels read any strides, so the compiler must neither copy nor reorder.

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_SELECTION = "Tensor tau, Tensor expiry, Tensor sat_end, Tensor sup_end, Tensor interior"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor scores"
_OPTIONS = "int k, int window, float scale, str gate"
_SCHEMAS = {
    "select": f"(Tensor scores, int k, int window) -> ({_SELECTION})",
    "attention": f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse, {_SELECTION})",
    "attention_backward": f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, {_SELECTION}, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor du)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"sparsek::{_name}", _schema, tags=_TAGS)

SELECT = torch.ops.sparsek.select.default
ATTENTION = torch.ops.sparsek.attention.default
ATTENTION_BACKWARD = torch.ops.sparsek.attention_backward.default


# ---------------------------------------------------------------------------------------------------------------------
# Implementations: kernels or reference. They check their arguments too: compiled code arrives here unchecked.


@functools.cache
def _modules() -> tuple[Any, Any]:
    """``launch`` and ``dispatch``, loaded when first needed: Triton exists on Linux only."""
    from . import dispatch, launch

    return launch, dispatch


@functools.cache
def _replay() -> Any:
    from . import replay

    return replay


@functools.cache
def _interpreter() -> bool:
    if not has_triton_package():
        return False
    from triton import knobs

    return knobs.runtime.interpret


def _runs_kernels(t: Tensor) -> bool:
    return t.is_cuda or (_interpreter() and t.dtype in (torch.float32, torch.float16))


@functools.cache
def _default_configs(problem: Problem) -> Mapping[str, Any]:
    """Configs for the interpreter, for which nothing is tuned."""
    from .kernel_templates import TEMPLATES

    return {name: template.default(problem, target_device("cuda:90")) for name, template in TEMPLATES.items()}


def _configs(problem: Problem, device: torch.device) -> Mapping[str, Any]:
    return _modules()[1].configs(problem, device.index) if device.type == "cuda" else _default_configs(problem)


_HERE = contextlib.nullcontext()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def _widen(scores: Tensor, beside: torch.dtype) -> Tensor:
    return scores.to(torch.float64 if beside == torch.float64 else torch.float32)


def _single(scores: Tensor) -> Tensor:
    return scores.detach().to(torch.float32) if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _replayed(stage: str, anew: Any, tensors: tuple[Tensor, ...], *options: Any) -> tuple[Tensor, ...]:
    """``anew(call, tensors, *options)``, or, on a GPU, its replay where nothing is new but addresses. The key holds all
    that checks and configs depend on too: what is replayed has passed them."""
    first = tensors[0]
    if not first.is_cuda:
        return anew(None, tensors, *options)
    call = _replay().call(tensors, stage, options, autocast_dtypes(tensors), _modules()[1].generation)
    if plan := call.plan:
        with _on(first.device):
            return plan(call.pointers)
    return anew(call, tensors, *options)


def _launched(call: Any, kernels: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return kernels(*tensors) if call is None else call.work_out(kernels, tensors)


def _select(scores: Tensor, k: int, window: int) -> tuple[Tensor, ...]:
    return _replayed("select", _select_anew, (_single(scores),), k, window)


@torch.no_grad()
def _select_anew(call: Any, tensors: tuple[Tensor, ...], k: int, window: int) -> tuple[Tensor, ...]:
    (scores,) = tensors
    check_select(scores, k, window)
    if not _runs_kernels(scores):
        return reference.select(scores, k, window)
    batch, heads, n = scores.shape
    problem = Problem.of("fp32", 64, 1, "kv", k, window, n, batch * heads)  # only k, w, n and rows matter here
    with _on(scores.device):
        config = _configs(problem, scores.device)["threshold"]

        def kernels(scores: Tensor) -> tuple[Tensor, ...]:
            return _modules()[0].threshold(scores.contiguous(), min(k, n), min(window, n), config)

        return _launched(call, kernels, tensors)


def _attention(query, key, value, scores, k, window, scale, gate, wanted=7) -> tuple[Tensor, ...]:
    """wanted: how many of the results; the others are allocated with the workspace."""
    tensors = query, key, value, _single(scores)
    results = _replayed("attention", _attention_anew, tensors, k, window, scale, gate, wanted)
    if captured.active:
        captured.note(problem_of(query, key, k, window, gate), "forward")
    return results


@torch.no_grad()
def _attention_anew(call: Any, tensors: tuple[Tensor, ...], k, window, scale, gate, wanted) -> tuple[Tensor, ...]:
    query, key, value, scores = tensors
    check_attention(query, key, value, scores, k, window, scale, gate)
    if not _runs_kernels(query):
        args = query, key, value, _widen(scores, query.dtype)
        return tuple(reference.attention_forward(*args, k, window, scale, gate))[:wanted]
    n = query.shape[2]
    with _on(query.device):
        configs = _configs(problem_of(query, key, k, window, gate), query.device)

        def kernels(*tensors: Tensor) -> tuple[Tensor, ...]:
            return _modules()[0].attention(*tensors, min(k, n), min(window, n), scale, gate, configs)[:wanted]

        return _launched(call, kernels, tensors)


def _attention_backward(dout, query, key, value, scores, *rest) -> tuple[Tensor, ...]:
    tensors = dout, query, key, value, _single(scores), *rest[:-4]
    dq, dk, dv, du = _replayed("attention_backward", _backward_anew, tensors, *rest[-4:])
    if captured.active:
        k, window, _, gate = rest[-4:]
        captured.note(problem_of(query, key, k, window, gate), "backward")
    return dq, dk, dv, du if du.dtype == scores.dtype else du.to(scores.dtype)


@torch.no_grad()
def _backward_anew(call: Any, tensors: tuple[Tensor, ...], k, window, scale, gate) -> tuple[Tensor, ...]:
    dout, query, key, value, scores, out, lse, *parts = tensors
    check_attention(query, key, value, scores, k, window, scale, gate)
    check_gradient(dout, query)
    if not _runs_kernels(query):
        args = dout, query, key, value, _widen(scores, query.dtype), out, lse, Selection(*parts)
        return tuple(reference.attention_backward(*args, k, window, scale, gate))
    n = query.shape[2]
    with _on(query.device):
        configs = _configs(problem_of(query, key, k, window, gate), query.device)

        def kernels(*tensors: Tensor) -> tuple[Tensor, ...]:
            args = *tensors[:7], Selection(*tensors[7:]), min(k, n), min(window, n), scale, gate, configs
            return _modules()[0].attention_backward(*args)

        return _launched(call, kernels, tensors)


for _name, _impl in {"select": _select, "attention": _attention, "attention_backward": _attention_backward}.items():
    for _key in ("CPU", "CUDA"):
        torch.library.impl(f"sparsek::{_name}", _key, _impl)


# ---------------------------------------------------------------------------------------------------------------------
# Fakes: shapes and dtypes only. Every output is contiguous.


@torch.library.register_fake("sparsek::select")
def _select_fake(scores: Tensor, k: int, window: int) -> tuple[Tensor, ...]:
    return _selection_fake(scores, scores.dtype)


@torch.library.register_fake("sparsek::attention")
def _attention_fake(query, key, value, scores, k, window, scale, gate) -> tuple[Tensor, ...]:
    tau, *rest = _selection_fake(scores, query.dtype)
    return query.new_empty(query.shape), tau.new_empty(query.shape[:3]), tau, *rest


@torch.library.register_fake("sparsek::attention_backward")
def _attention_backward_fake(dout, query, key, value, scores, *rest) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (query, key, value, scores))


def _selection_fake(scores: Tensor, beside: torch.dtype) -> tuple[Tensor, ...]:
    tau = scores.new_empty(scores.shape, dtype=torch.float64 if beside == torch.float64 else torch.float32)
    return tau, *(scores.new_empty(scores.shape, dtype=torch.int32) for _ in range(4))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, vmap and FLOP counts


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, scores, k, window, scale, gate):
        return ATTENTION(query, key, value, scores, k, window, scale, gate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, k, window, scale, gate = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.options = k, window, scale, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *_):
        return _gradients(ctx, dout)


class _EagerAttention(torch.autograd.Function):
    """The same without transforms of torch.func, at a third of the cost: only the output passes through autograd."""

    @staticmethod
    def forward(ctx, query, key, value, scores, k, window, scale, gate):
        attention = _attention if unseen(query, key, value, scores) else ATTENTION
        out, *rest = attention(query, key, value, scores, k, window, scale, gate)
        ctx.save_for_backward(query, key, value, scores, out, *rest)
        ctx.set_materialize_grads(False)
        ctx.options = k, window, scale, gate
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return _gradients(ctx, dout)


def _gradients(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:  # the output's gradient is known to be zero
        return (None,) * 8
    dq, dk, dv, du = ATTENTION_BACKWARD(dout, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None if ctx.options[-1] == "none" else du, None, None, None, None


def _register_vmap(op: Any) -> None:
    """vmap of ``op``: the mapped dimension becomes part of the batch, the first dimension of every tensor."""

    def rule(info, in_dims, *args):
        size = info.batch_size

        def fold(x, dim):
            if not isinstance(x, Tensor):
                return x
            return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        outputs = op(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in outputs), (0,) * len(outputs)

    torch.library.register_vmap(op, rule)


for _op in (SELECT, ATTENTION, ATTENTION_BACKWARD):
    _register_vmap(_op)


if torch.ops.sparsek.attention not in flop_registry:  # a second registration raises
    register_flop_formula(torch.ops.sparsek.attention)(attention_flops)
    register_flop_formula(torch.ops.sparsek.attention_backward)(backward_flops)
captured.start()
