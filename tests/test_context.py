"""Eager calls go past PyTorch's dispatcher only where nothing would miss them."""

from __future__ import annotations

import pytest
import torch
from op_inputs import OPTIONS, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparsek_tune import context, ops
from sparsek_tune.ops import sparsek_attention


@pytest.fixture
def dispatched(monkeypatch):
    """Names of the ops that are called through the dispatcher."""
    seen = []
    for name in ("ATTENTION", "ATTENTION_BACKWARD"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op: seen.append(op.name()) or op(*args))
    return seen


def attend(tensors):
    k, window, scale, gate = OPTIONS
    return sparsek_attention(*tensors, k, window=window, scale=scale, gate=gate)


def step(tensors):
    out = attend(tensors)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def test_both_ways_give_the_same(dispatched, monkeypatch):
    plain = step(make(grad=True))
    assert dispatched.pop() == "sparsek::attention_backward" and not dispatched
    with torch.no_grad():
        assert torch.equal(attend(make()), plain[0])
    assert not dispatched
    monkeypatch.setattr(ops, "unseen", lambda *tensors: False)
    for a, b in zip(plain, step(make(grad=True)), strict=True):
        assert torch.equal(a, b)
    assert dispatched == ["sparsek::attention", "sparsek::attention_backward"]
    assert torch.equal(attend(make()), plain[0])


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "within", [Watch, lambda: FlopCounterMode(display=False), lambda: torch.device("cpu"), torch.profiler.profile]
)
def test_modes_and_profilers_see_the_op(within, dispatched):
    tensors = make(grad=True)
    with within():
        attend(tensors)
    with within(), torch.no_grad():
        attend(tensors)
    assert dispatched == ["sparsek::attention"] * 2


def test_profiles_name_the_op():
    with torch.profiler.profile() as profile, torch.no_grad():
        attend(make())
    assert "sparsek::attention" in {event.key for event in profile.key_averages()}


def test_subclasses_see_the_op(dispatched):
    query, *rest = make()
    out = attend([query.as_subclass(Tagged), *rest])
    assert dispatched == ["sparsek::attention"] and isinstance(out, Tagged)


def test_parameters_are_plain_tensors(dispatched):
    query, *rest = make()
    out = attend([torch.nn.Parameter(query), *rest])
    assert not dispatched and out.requires_grad


def test_meta_tensors_have_shapes_alone(dispatched):
    out = attend([t.to("meta") for t in make()])
    assert dispatched == ["sparsek::attention"] and out.is_meta and out.shape == make()[0].shape


def test_negative_views_are_resolved(dispatched):
    """Their sign is a flag of the tensor, which kernels do not read."""
    query, *rest = make()
    negative = torch.complex(query, -query).conj().imag
    assert negative.is_neg()
    out = attend([negative, *rest])
    assert dispatched == ["sparsek::attention"] and torch.equal(out, attend([query, *rest]))


def test_inference_mode(dispatched):
    with torch.inference_mode():
        out = attend(make())
    assert out.is_inference() and not dispatched


def test_fewer_results_are_the_first_ones():
    tensors = make()
    whole, some = ops._attention(*tensors, *OPTIONS), ops._attention(*tensors, *OPTIONS, wanted=1)
    assert len(some) == 1 and torch.equal(some[0], whole[0])


def test_nothing_is_unseen_while_compiling():
    seen = []

    def function(x):
        seen.append(context.unseen(x))
        return x + 1

    torch.compile(function, backend="eager")(torch.ones(2))
    assert seen == [False] and context.unseen(torch.ones(2))
