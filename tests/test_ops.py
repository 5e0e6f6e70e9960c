"""The registered ops and the public functions on the CPU, where they run the reference."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys

import pytest
import torch
from op_inputs import LENGTHS, OPTIONS, attention_args, backward_args, dense_attention, make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from sparsek_tune import ops
from sparsek_tune.ops import sparsek, sparsek_attention, sparsek_select

# Meaning


@pytest.mark.parametrize("gate", ["kv", "v", "none"])
@pytest.mark.parametrize("window", [0, 5])
def test_forward_is_the_definition(gate, window):
    tensors = make(n=30, b=1, dtype=torch.float64)
    out = sparsek_attention(*tensors, 6, window=window, scale=0.4, gate=gate)
    assert_close(out, dense_attention(*tensors, 6, window, 0.4, gate), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gate", ["kv", "v"])
def test_gradients_are_exact(gate):
    tensors = make(n=14, b=1, hq=2, hkv=1, d=3, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *t: sparsek_attention(*t, 3, window=2, gate=gate), tensors, eps=1e-7)


def test_gate_none_has_no_score_gradient():
    *qkv, scores = make(grad=True)
    sparsek_attention(*qkv, scores, 3, window=2, gate="none").sum().backward()
    assert scores.grad is None
    assert all(t.grad.abs().sum() > 0 for t in qkv)


def test_default_scale_and_output_layout():
    query, *rest = make(permuted=True)
    out = sparsek_attention(query, *rest, 5)
    assert out.is_contiguous()
    assert_close(out, sparsek_attention(query, *rest, 5, scale=query.shape[-1] ** -0.5), rtol=0, atol=0)


def test_layout_of_inputs_does_not_matter():
    permuted, contiguous = make(permuted=True), [t.contiguous() for t in make(permuted=True)]
    assert not permuted[0].is_contiguous()
    assert_close(sparsek_attention(*permuted, 5), sparsek_attention(*contiguous, 5), rtol=0, atol=0)


def test_budget_and_window_beyond_the_length():
    query, key, value, scores = make(n=20, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for k, window in ((20, 0), (10**6, 0), (1, 20), (1, 10**6), (2**31 - 1, 2**31 - 1)):
        assert_close(sparsek_attention(query, key, value, scores, k, window=window), expected)
        tau, expiry = sparsek_select(scores, k, window=window)
        assert tau.isneginf().all()
        assert (expiry == 20).all()


def test_select_returns_intervals():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 5.0, 2.0, 4.0]]])
    tau, expiry = sparsek_select(scores.requires_grad_(), 2, window=1)
    # The candidates of query i are the keys 0..i-1. Key 1 is out at query 3, key 2 at query 4, key 4 is never in.
    assert expiry.tolist() == [[[6, 3, 4, 6, 5, 6]]]
    assert tau.dtype == torch.float32 and expiry.dtype == torch.int32
    assert not tau.requires_grad
    assert tau[0, 0, :3].isneginf().all() and tau[0, 0, 3:].isfinite().all()


def test_projection():
    z = torch.randn(3, 9, 2, dtype=torch.float64, requires_grad=True)
    p = sparsek(z, 4, dim=1)
    assert_close(p.sum(1), torch.full((3, 2), 4.0, dtype=torch.float64))
    assert p.min() >= 0 and p.max() <= 1
    assert torch.autograd.gradcheck(lambda z: sparsek(z, 4, 1), z)
    assert (sparsek(z, 12, 1) == 1).all()
    assert_close(torch.compile(sparsek, fullgraph=True, backend="aot_eager")(z, 4, 1), p)


def test_half_scores_are_computed_in_float32():
    *qkv, scores = make()
    half = scores.half().requires_grad_()
    out = sparsek_attention(*qkv, half, 5, window=2)
    assert_close(out, sparsek_attention(*qkv, half.detach().float(), 5, window=2), rtol=0, atol=0)
    out.sum().backward()
    assert half.grad.dtype == torch.float16 and half.grad.abs().sum() > 0


def test_results_repeat_bit_for_bit():
    def run():
        tensors = make(n=64, grad=True)
        out = sparsek_attention(*tensors, 9, window=3)
        out.square().sum().backward()
        return out, *(t.grad for t in tensors)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


# Registration


@pytest.mark.parametrize("batch", [2, 1])  # of one, a permuted tensor folds to rows without a copy
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("name", ["select", "attention", "attention_backward"])
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # the Function outside of the ops has it
def test_opcheck(name, grad, permuted, batch):
    if name == "select":
        args = (make(b=batch, grad=grad, permuted=permuted)[3], 7, 5)
    elif name == "attention":
        args = attention_args(b=batch, grad=grad, permuted=permuted)
    else:
        args = tuple(
            t.detach().requires_grad_(grad) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in backward_args(b=batch, permuted=permuted)
        )
    torch.library.opcheck(getattr(torch.ops.sparsek, name).default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_fake_dtypes_are_the_real_ones(dtype):
    for op, args in (
        (ops.ATTENTION, attention_args(dtype=dtype)),
        (ops.ATTENTION_BACKWARD, backward_args(dtype=dtype)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_score_gradient_has_the_scores_dtype():
    *before, (k, window, scale, gate) = *backward_args()[:-4], OPTIONS
    before[4] = before[4].bfloat16()
    torch.library.opcheck(ops.ATTENTION_BACKWARD, (*before, k, window, scale, gate), test_utils="test_faketensor")


def test_ops_are_tagged():
    for op in (ops.SELECT, ops.ATTENTION, ops.ATTENTION_BACKWARD):
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(op.tags)


def test_import_loads_torch_triton_and_the_standard_library_only():
    code = (
        "import sys, torch\ntry:\n    import triton\nexcept ImportError:\n    pass\nbefore = set(sys.modules)\n"
        "import sparsek_tune.ops\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print(*sorted(new - {'torch', 'triton', 'sparsek_tune'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# Compilation


def layer(query, key, value, scores):
    """An operator between two others, so that the compiler has something to plan around it."""
    return sparsek_attention(query * 1.5, key, value, scores, 7, window=5).relu()


def run_compiled(compiled, n, permuted, batch=2):
    a, b = (make(n=n, b=batch, grad=True, permuted=permuted) for _ in range(2))
    got, expected = compiled(*a), layer(*b)
    assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(a, b, strict=True):
        assert_close(x.grad, y.grad)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_one_graph_serves_every_length(permuted):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for n in LENGTHS:
        run_compiled(compiled, n, permuted)
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("batch", [2, 1])
def test_inductor(batch):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for n in LENGTHS[:2]:
        run_compiled(compiled, n, permuted=True, batch=batch)


def test_select_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(lambda u: sparsek_select(u, 4, window=2)[1] + 1, fullgraph=True, backend="aot_eager")
    scores = make()[3]
    assert torch.equal(compiled(scores), sparsek_select(scores, 4, window=2)[1] + 1)


def test_compiled_code_checks_arguments_too():
    torch._dynamo.reset()
    query, key, value, scores = make()
    compiled = torch.compile(lambda *t: sparsek_attention(*t, 4), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="scores must be of shape"):
        compiled(query, key, value, scores[:, :, :-1])


def test_export_keeps_the_op():
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return layer(*tensors)

    program = torch.export.export(Layer(), make(), strict=False)
    assert [str(node.target) for node in program.graph.nodes].count("sparsek.attention.default") == 1
    assert_close(program.module()(*make()), layer(*make()))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_all_but_the_scores(compiled):
    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    tensors = make(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*tensors)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    cast = [t.detach().bfloat16() for t in (tensors[0] * 1.5, *tensors[1:3])]
    assert_close(out, sparsek_attention(*cast, tensors[3].detach(), 7, window=5).relu(), rtol=0, atol=0)


def test_autocast_mends_mixed_dtypes():
    query, key, value, scores = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert sparsek_attention(query.bfloat16(), key, value, scores, 4).dtype == torch.bfloat16


# Other systems that look at ops by name


class CountForward(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is ops.ATTENTION
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("save", "runs"), [(False, 2), (True, 1)])
def test_selective_checkpointing_sees_the_op(save, runs):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if save and op is ops.ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    tensors, same = make(grad=True), make(grad=True)
    with CountForward() as mode:
        checkpoint(layer, *tensors, use_reentrant=False, context_fn=contexts).sum().backward()
    assert mode.count == runs
    layer(*same).sum().backward()
    for a, b in zip(tensors, same, strict=True):
        assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_flop_counts():
    n, k, window = 40, 7, 5
    tensors = make(n=n, b=2, hq=4, d=8, grad=True)
    with FlopCounterMode(display=False) as mode:
        out = sparsek_attention(*tensors, k, window=window)
    pairs = sum(min(i + 1, k + window) for i in range(n))
    assert mode.get_total_flops() == 4 * 8 * 2 * 4 * pairs
    with FlopCounterMode(display=False) as mode:
        out.sum().backward()
    assert mode.get_total_flops() == 10 * 8 * 2 * 4 * pairs


def test_vmap_is_a_loop():
    many = [torch.stack(ts) for ts in zip(*(make(seed=s) for s in range(3)), strict=True)]
    key = many[1][0]

    def loss(query, value, scores):
        return layer(query, key, value, scores).square().sum()

    query, _, value, scores = many
    got = torch.vmap(torch.func.grad_and_value(loss, argnums=(0, 1, 2)), in_dims=(0, 1, 0))(
        query, value.movedim(0, 1), scores
    )
    for i in range(3):
        expected = torch.func.grad_and_value(loss, argnums=(0, 1, 2))(query[i], value[i], scores[i])
        assert_close(got[1][i], expected[1])
        for a, b in zip(got[0], expected[0], strict=True):
            assert_close(a[i], b)


def test_vmap_of_select():
    scores = torch.randn(3, 2, 2, 24)
    tau, expiry = torch.vmap(lambda u: sparsek_select(u, 4, window=2), in_dims=1)(scores)
    for i in range(2):
        one = sparsek_select(scores[:, i], 4, window=2)
        assert torch.equal(tau[i], one[0]) and torch.equal(expiry[i], one[1])


def test_second_derivative_is_refused():
    tensors = make(grad=True)
    (grad,) = torch.autograd.grad(layer(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiable once|twice"):
        grad.sum().backward()


# Eager calls outside of transforms take a shorter way through autograd


def test_gradients_of_many_output_gradients_at_once():
    tensors = make(n=12, dtype=torch.float64, grad=True)
    out = sparsek_attention(*tensors, 3, window=2)
    many = torch.randn(3, *out.shape, dtype=out.dtype)
    got = torch.autograd.grad(out, tensors, many, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(many):
        for a, b in zip(got, torch.autograd.grad(out, tensors, dout, retain_graph=True), strict=True):
            assert_close(a[i], b)


def test_forward_mode_is_refused_not_ignored():
    query, *rest = make()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(RuntimeError, match="jvp"):
            sparsek_attention(dual, *rest, 4)


def test_no_graph_without_need():
    tensors = make(grad=True)
    assert sparsek_attention(*tensors, 4).grad_fn is not None
    assert sparsek_attention(*tensors[:3], tensors[3].detach(), 4).grad_fn is not None
    assert not sparsek_attention(*(t.detach() for t in tensors), 4).requires_grad
    with torch.no_grad():
        assert not sparsek_attention(*tensors, 4).requires_grad
