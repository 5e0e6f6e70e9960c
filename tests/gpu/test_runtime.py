"""How the ops behave on a GPU: graphs, compilation, memory, synchronisation, repeatability, large tensors, dispatch."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from sparsek_tune import dispatch, ops, replay
from sparsek_tune.ops import sparsek_attention, sparsek_select

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

K, W = 128, 64


def make(n=1000, b=1, hq=4, hkv=2, d=64, dtype=torch.bfloat16, permuted=True, seed=0):
    """query, key, value, scores that require gradients; ``permuted``: storage [B, N, H, D]."""
    g = torch.Generator("cuda").manual_seed(seed)

    def one(heads):
        t = torch.randn(b, n, heads, d, generator=g, device="cuda", dtype=dtype).transpose(1, 2)
        return (t if permuted else t.contiguous()).requires_grad_()

    scores = torch.randn(b, hkv, n, generator=g, device="cuda") + 1e-3 * torch.arange(n, device="cuda")
    return [one(hq), one(hkv), one(hkv), scores.requires_grad_()]


def step(tensors):
    """Output and all gradients."""
    out = sparsek_attention(*tensors, K, window=W)
    return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]


def test_results_repeat_bit_for_bit():
    tensors = make(n=3000, b=2)
    first = [t.clone() for t in step(tensors)]
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(step(tensors), first, strict=True))


def test_cuda_graph_replays_forward_and_backward():
    tensors = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors)
    for seed in (1, 2):
        fresh = make(seed=seed)
        with torch.no_grad():
            for t, f in zip(tensors, fresh, strict=True):
                t.copy_(f)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(fresh), strict=True))


def test_reduce_overhead_mode():
    torch._dynamo.reset()

    def loss(*tensors):
        return sparsek_attention(*tensors, K, window=W).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        a, b = make(seed=seed), make(seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        compiled(*a).backward()
        loss(*b).backward()
        for x, y in zip(a, b, strict=True):
            assert_close(x.grad, y.grad)


def test_no_host_synchronisation():
    tensors = make()
    step(tensors)
    sparsek_select(tensors[3], K, window=W)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors)
        sparsek_select(tensors[3], K, window=W)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_every_length(backend):
    torch._dynamo.reset()

    def layer(query, *rest):
        return sparsek_attention(query * 1.5, *rest, K, window=W).relu()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for n in (333, 512, 1000, 1777):
        a, b = make(n=n), make(n=n)
        got, expected = compiled(*a), layer(*b)
        assert_close(got, expected)
        got.float().square().sum().backward()
        expected.float().square().sum().backward()
        for x, y in zip(a, b, strict=True):
            assert_close(x.grad, y.grad)
    assert counter.frame_count == 1


def test_autocast():
    tensors = make(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = sparsek_attention(*tensors, K, window=W)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    cast = [t.detach().bfloat16() for t in tensors[:3]]
    assert torch.equal(out, sparsek_attention(*cast, tensors[3], K, window=W))


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # the Function outside of the ops has it
def test_opcheck(permuted):
    args = (*make(n=200, permuted=permuted), 16, 8, 0.2, "kv")
    torch.library.opcheck(ops.ATTENTION, args)
    with torch.no_grad():
        out, *rest = ops.ATTENTION(*args)
        backward = (torch.randn_like(out), *(t.detach() for t in args[:4]), out, *rest, *args[4:])
    torch.library.opcheck(ops.ATTENTION_BACKWARD, backward)
    torch.library.opcheck(ops.SELECT, (args[3], 16, 8))


def test_peak_memory_is_linear_in_length():
    def peak(n):
        tensors = make(n=n, hq=8)
        step(tensors)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(tensors)
        return torch.cuda.max_memory_allocated() - before

    small, large = peak(1 << 14), peak(1 << 16)
    assert 3.5 < large / small < 4.5


def test_all_keys_is_dense_attention():
    query, key, value, scores = make(n=700, dtype=torch.float16)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert_close(sparsek_attention(query, key, value, scores, 700), dense, rtol=2e-3, atol=2e-3)


def test_configs_come_from_the_dispatcher(monkeypatch):
    tensors = make()
    step(tensors)
    asked = []
    real = dispatch.configs
    monkeypatch.setattr(
        dispatch, "configs", lambda problem, index: asked.append((problem, index)) or real(problem, index)
    )
    replay.clear()  # what is replayed has its configs already
    step(tensors)
    problem = ops.problem_of(*tensors[:2], K, W, "kv")
    assert asked == [(problem, 0)] * 2  # forward and backward
    assert real(problem, 0) is real(problem, 0)


def test_invalid_arguments():
    query, key, value, scores = make()
    with pytest.raises(ValueError, match="scores must be on query's device cuda:0, but is on cpu"):
        sparsek_attention(query, key, value, scores.cpu(), K)
    with pytest.raises(ValueError, match=r"query must have a head size D in \[1, 256\] on cuda, but D is 257"):
        sparsek_attention(*make(n=8, d=257), K)
    with pytest.raises(TypeError, match="query must be float32, float16 or bfloat16"):
        sparsek_attention(query.double(), key.double(), value.double(), scores, K)
    with pytest.raises(TypeError, match="scores must be float32, float16 or bfloat16"):
        sparsek_select(scores.double(), K)


def test_nan_scores_return():
    *qkv, scores = make()
    broken = scores.detach().clone()
    broken[..., ::7] = float("nan")
    assert sparsek_attention(*qkv, broken, K, window=W).shape == qkv[0].shape
    torch.cuda.synchronize()


def last_queries(query, key, value, scores, head, count):
    """The last ``count`` outputs of one query head in float64, as a function of its keys and values that they read."""
    n, kv = query.shape[2], head // (query.shape[1] // key.shape[1])
    tau, expiry = (t[0, kv] for t in sparsek_select(scores, K, window=W))
    at = torch.arange(n, device="cuda")
    read = at[(expiry > n - count) | (at > n - count - W)]
    i, u = at[-count:, None], scores[0, kv, read].double()
    window = (read <= i) & (read > i - W)
    chosen = (read + W <= i) & (i < expiry[read])
    m = torch.where(window, 1.0, (u - tau[-count:, None].double()).clamp(0, 1))
    q, kk, vv = (
        t.detach().double().requires_grad_() for t in (query[0, head, -count:], key[0, kv, read], value[0, kv, read])
    )
    logits = (q @ kk.T * m * query.shape[-1] ** -0.5).masked_fill(~(window | chosen), float("-inf"))
    return (torch.softmax(logits, -1) * m) @ vv, q, kk, vv, read


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_offsets_beyond_32_bits(permuted):
    torch.cuda.empty_cache()  # what tests before this one keep
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    n, count = 600_000, W
    query, key, value, scores = (t.detach() for t in make(n=n, hq=32, hkv=8, d=128, permuted=permuted))
    assert query.numel() > 2**31
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out = sparsek_attention(*leaves, scores, K, window=W)
    dout = torch.zeros_like(out)
    heads = (0, 31)
    for head in heads:
        dout[0, head, -count:] = torch.randn(count, 128, device="cuda")
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    for head in heads:
        expected, q, kk, vv, read = last_queries(*(t.detach() for t in leaves), scores, head, count)
        grads = torch.autograd.grad(expected, (q, kk, vv), dout[0, head, -count:].double())
        kv = head // 4
        got = (out[0, head, -count:], dq[0, head, -count:], dk[0, kv, read], dv[0, kv, read])
        for x, y in zip(got, (expected, *grads), strict=True):
            assert ((x.double() - y).norm() / y.norm()).item() < 5e-3
