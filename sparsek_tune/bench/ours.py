"""This package's own operators as the benchmark calls them. Whatever is not public is called here alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.ops import ATTENTION, sparsek_attention, sparsek_select
from sparsek_tune.tune.stages import Inputs, Pipeline


class Stages(NamedTuple):
    """Every stage alone, over results of those before it that were computed once; threshold and schedule one after the
    other, as the operator runs them; and the index tensors they share."""

    run: dict[str, Callable[[], Any]]
    find: Callable[[], Any]
    index: list[Tensor]


def stages(i: Inputs, configs: Mapping[str, Config]) -> Stages:
    """The stages of one call at ``configs``, launched as the tuner launches them."""
    pipeline = Pipeline(i, configs)
    run: dict[str, Callable[[], Any]] = {
        "threshold": lambda: pipeline.threshold(configs["threshold"]),
        "schedule": lambda: pipeline._schedule(configs["schedule"]),  # the public method times its consumers with it
        "forward": lambda: pipeline.forward(configs["forward"]),
        "dq": lambda: pipeline.dq(configs["dq"]),
        "dkv": lambda: pipeline.dkv(configs["dkv"]),
    }
    index = [*_tensors(pipeline.selection), *_tensors(pipeline.schedule_)]
    return Stages(run, lambda: Pipeline(i, configs).schedule_, index)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list):
        for part in x:
            yield from _tensors(part)


def index_bytes(index: list[Tensor]) -> int:
    """Bytes of the memory behind the index tensors; memory that two of them share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in index}.values())


def leaves(i: Inputs) -> tuple[Tensor, ...]:
    """query, key, value and scores as tensors that want a gradient; the scores only where the gate gives them one."""
    wants = (True, True, True, i.gate != "none")
    inputs = (i.query, i.key, i.value, i.scores)
    return tuple(t.detach().requires_grad_(w) for t, w in zip(inputs, wants, strict=True))


def attend(i: Inputs, tensors: tuple[Tensor, ...]) -> Tensor:
    """The public operator on ``tensors`` (query, key, value, scores), with the options of ``i``."""
    query, key, value, scores = tensors
    return sparsek_attention(query, key, value, scores, i.k, window=i.window, scale=i.scale, gate=i.gate)


def forward(i: Inputs) -> Callable[[], Tensor]:
    """The public operator without gradients, ready to be called."""
    tensors = (i.query, i.key, i.value, i.scores)

    def run() -> Tensor:
        with torch.no_grad():
            return attend(i, tensors)

    return run


def forward_with_grad(i: Inputs) -> Callable[[], Tensor]:
    """The same where inputs want gradients: autograd records the call."""
    tensors = leaves(i)
    return lambda: attend(i, tensors)


def forward_backward(i: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and all gradients."""
    tensors = leaves(i)
    wanted = [t for t in tensors if t.requires_grad]
    return lambda: torch.autograd.grad(attend(i, tensors), wanted, i.dout)


class Results(NamedTuple):
    """out [B, Hq, N, D], lse [B, Hq, N], tau and expiry [B, Hkv, N] of one forward pass."""

    out: Tensor
    lse: Tensor
    tau: Tensor
    expiry: Tensor


def results(i: Inputs) -> Results:
    """What the check looks into; tau and expiry come from the public :func:`sparsek_select`."""
    out, lse, *_ = ATTENTION(i.query, i.key, i.value, i.scores, i.k, i.window, i.scale, i.gate)
    return Results(out, lse, *sparsek_select(i.scores, i.k, window=i.window))
