"""Attention against autograd through a dense formulation, finite differences, and a gather per query."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from sparsek_tune import reference
from sparsek_tune.reference import Selection, attention_backward, attention_forward, sparsek_attention

GATES = ("kv", "v", "none")
SHAPES = [(1, 1, 0), (20, 4, 0), (21, 5, 3), (20, 1, 2), (20, 30, 0), (20, 3, 30), (24, 12, 1)]


def closed_form(q: Tensor, k: Tensor, v: Tensor, u: Tensor, do: Tensor, *options) -> dict[str, Tensor]:
    out, lse, *rest = attention_forward(q, k, v, u, *options)
    grads = attention_backward(do, q, k, v, u, out, lse, Selection(*rest), *options)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv", "du"), grads, strict=True))}


def dense(q: Tensor, k: Tensor, v: Tensor, u: Tensor, do: Tensor, *options) -> dict[str, Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, u)]
    out, lse = oracles.dense_attention(*leaves, *options)
    grads = torch.autograd.grad(out, leaves, do.double(), allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv", "du"), grads, strict=True))}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tol: float) -> None:
    for name in want:
        oracles.assert_close(got[name], want[name].detach(), tol, name)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_attention_is_the_dense_formulation(kind: str, shape: tuple[int, int, int], gate: str):
    n, k, window = shape
    u = oracles.make_scores(kind, (1, 2, n))
    q, key, v, do = oracles.make_qkv(1, 2, 3, n, 5)
    args = (q, key, v, u, do, k, window, 0.7, gate)
    got = closed_form(*args)
    assert_same(got, dense(*args), 2e-9 if kind == "huge" else 1e-10)
    if gate == "none":
        assert not got["du"].any()


@pytest.mark.parametrize("g", [1, 3, 4])
@pytest.mark.parametrize("gate", GATES)
def test_attention_over_batches_and_groups(g: int, gate: str):
    u = oracles.make_scores("normal", (2, 2, 30), seed=5)
    q, key, v, do = oracles.make_qkv(2, 2, g, 30, 8, seed=5)
    args = (q, key, v, u, do, 6, 4, 8**-0.5, gate)
    assert_same(closed_form(*args), dense(*args), 1e-11)


@pytest.mark.parametrize("gate", ["kv", "v"])
@pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])
def test_gradients_are_finite_differences(gate: str, spread: float):
    n, k, window = 24, 5, 3
    u = spread * oracles.make_scores("normal", (1, 2, n), seed=7)
    q, key, v, do = oracles.make_qkv(1, 2, 2, n, 4, seed=7)
    options: tuple[Any, ...] = (k, window, 0.5, gate)
    got = closed_form(q, key, v, u, do, *options)
    tensors = {"dq": q, "dk": key, "dv": v, "du": u}
    for slot, (name, x) in enumerate(tensors.items()):

        def loss(moved: Tensor, slot: int = slot) -> Tensor:
            args = [*tensors.values()]
            args[slot] = moved
            return (attention_forward(*args, *options)[0] * do).sum()

        coordinates = [(0, 0, j) for j in range(n)] if name == "du" else [(0, 1, j, j % 4) for j in range(0, n, 3)]
        step = 1e-6  # no kink is nearer than this for the seed: the selection must not move
        for at in coordinates:
            want = oracles.finite_difference(loss, x, at, step)
            assert got[name][at].item() == pytest.approx(want, rel=1e-5, abs=2e-7), (name, at)


def test_a_cut_key_inside_the_support_gets_minus_gbar():
    # Query 2 sees scores 1/2, 1/4, 0 and keeps one: tau = -1/12, all three are inside, keys 1 and 2 are cut.
    u = torch.tensor([[[0.5, 0.25, 0.0]]], dtype=torch.float64)
    q, key, v, do = oracles.make_qkv(1, 1, 1, 3, 2)
    do[:, :, :2] = 0
    got = closed_form(q, key, v, u, do, 1, 0, 1.0, "v")
    g = (do[0, 0, 2] * v[0, 0, 0]).sum()  # one key: p = 1
    torch.testing.assert_close(got["du"][0, 0], torch.stack([g - g / 3, -g / 3, -g / 3]))


def test_attention_does_not_depend_on_the_blocks(monkeypatch):
    u = oracles.make_scores("normal", (2, 2, 90))
    q, key, v, do = oracles.make_qkv(2, 2, 2, 90, 8)
    args = (q, key, v, u, do, 12, 7, 0.3, "kv")
    want = closed_form(*args)
    for block in (1, 3000, 30_000):
        monkeypatch.setattr(reference, "BLOCK", block)
        assert_same(closed_form(*args), want, 1e-13)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("gate", GATES)
def test_attention_in_lower_precision(dtype: torch.dtype, tol: float, gate: str):
    u = oracles.make_scores("normal", (2, 2, 60)).float()
    q, key, v, do = oracles.make_qkv(2, 2, 2, 60, 16, dtype=dtype)
    options = (10, 6, 0.25, gate)
    got = closed_form(q, key, v, u, do, *options)
    want = closed_form(q.double(), key.double(), v.double(), u.double(), do.double(), *options)
    assert_same(got, want, tol)
    assert all(got[name].dtype == dtype for name in ("out", "dq", "dk", "dv"))
    assert got["lse"].dtype == got["du"].dtype == torch.float32


def test_attention_takes_permuted_inputs():
    u = oracles.make_scores("normal", (2, 2, 40))
    q, key, v, do = oracles.make_qkv(2, 2, 2, 40, 8)
    args = (10, 3, 0.4, "kv")
    want = closed_form(q, key, v, u, do, *args)
    q, key, v, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, key, v, do))
    u = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert not q.is_contiguous()
    assert_same(closed_form(q, key, v, u, do, *args), want, 1e-13)


def test_autocast_does_not_lower_the_precision_inside():
    u = oracles.make_scores("normal", (1, 1, 40)).float()
    args = (*oracles.make_qkv(1, 1, 2, 40, 16, dtype=torch.float32), 10, 3, 0.25, "kv")
    want = closed_form(*args[:3], u, *args[3:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = closed_form(*args[:3], u, *args[3:])
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_convenience_is_differentiable_once():
    u = oracles.make_scores("normal", (1, 2, 30))
    q, key, v, do = oracles.make_qkv(1, 2, 2, 30, 6)
    want = closed_form(q, key, v, u, do, 5, 2, 6**-0.5, "kv")
    leaves = q, key, v, u = [x.clone().requires_grad_() for x in (q, key, v, u)]
    out = sparsek_attention(q, key, v, u, 5, window=2)
    got = torch.autograd.grad(out, leaves, do.requires_grad_(), create_graph=True)
    assert torch.equal(out, want["out"])
    assert all(torch.equal(a, want[name]) for a, name in zip(got, ("dq", "dk", "dv", "du"), strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        got[0].sum().backward()


def test_window_of_everything_is_causal_attention():
    u = oracles.make_scores("normal", (1, 2, 50))
    q, key, v, _ = oracles.make_qkv(1, 2, 2, 50, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, key, v, is_causal=True, enable_gqa=True)
    for k, window, gate in [(1, 50, "kv"), (50, 0, "kv"), (30, 20, "v"), (1, 10**6, "none")]:
        torch.testing.assert_close(sparsek_attention(q, key, v, u, k, window=window, gate=gate), want)


def test_long_context_by_a_gather_per_query():
    n, k, window, d = 4096, 300, 200, 64
    u = oracles.make_scores("normal", (1, 2, n)).float()
    q, key, v, _ = oracles.make_qkv(1, 2, 4, n, d, dtype=torch.float32)
    out, lse, *_ = attention_forward(q, key, v, u, k, window)
    taus = [oracles.stream_tau(row.tolist(), k) for row in u[0]]
    for i in (0, 150, 499, 500, 501, 2047, 3333, 4095):
        for head in (0, 3, 4, 7):
            row = head // 4
            count = max(0, i - window + 1)
            best = u[0, row, :count].double().sort(descending=True, stable=True).indices[:k]
            gate = torch.ones(len(best), dtype=torch.float64)
            if count > k:
                gate = (u[0, row, best].double() - taus[row][count - 1]).clamp(0, 1)
            keys = torch.cat([best, torch.arange(count, i + 1)])
            m = torch.cat([gate, torch.ones(i + 1 - count, dtype=torch.float64)])
            logits = m * (key[0, row, keys].double() @ q[0, head, i].double()) * d**-0.5
            want = (m * logits.softmax(0)) @ v[0, row, keys].double()
            oracles.assert_close(out[0, head, i], want, 1e-5)
            assert lse[0, head, i].item() == pytest.approx(logits.logsumexp(0).item(), rel=1e-5)
