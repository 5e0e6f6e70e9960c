"""The real kernels in Triton's interpreter, through the ops, against the reference in float64.

Own process: ``TRITON_INTERPRET=1 pytest -m interpret``. It covers indexing, masks and arithmetic; races, shared memory
and bfloat16 only a GPU shows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from sparsek_tune import ops, reference
from sparsek_tune.ops import sparsek_attention, sparsek_select

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One call. ``scores``: how they run over positions; ``permuted``: storage [B, N, H, D]."""

    n: int = 70
    k: int = 12
    w: int = 10
    g: int = 2
    d: int = 32
    gate: str = "kv"
    scores: str = "random"
    dtype: torch.dtype = torch.float32
    b: int = 1
    hkv: int = 1
    permuted: bool = False

    def tensors(self) -> list[torch.Tensor]:
        gen = torch.Generator().manual_seed(self.n + self.k)

        def one(heads: int) -> torch.Tensor:
            t = torch.randn(self.b, self.n, heads, self.d, generator=gen).to(self.dtype).transpose(1, 2)
            return (t if self.permuted else t.contiguous()).detach().requires_grad_()

        u = make_scores(self.scores, (self.b, self.hkv, self.n), gen).requires_grad_()
        return [one(self.g * self.hkv), one(self.hkv), one(self.hkv), u]


def make_scores(kind: str, shape: tuple[int, ...], gen: torch.Generator) -> torch.Tensor:
    noise, ramp = torch.randn(shape, generator=gen), torch.arange(shape[-1]) / 8
    return {
        "random": noise,
        "wide": 20 * noise,
        "ties": (2 * noise).round() / 2,
        "equal": torch.full(shape, 0.25),
        "rising": ramp.expand(shape).clone(),
        "falling": (-ramp).expand(shape).clone(),
        "slope": noise + 1e-3 * torch.arange(shape[-1]),
    }[kind]


CASES = [
    *(Case(scores=s) for s in ("random", "wide", "ties", "equal", "rising", "falling", "slope")),
    *(Case(scores=s, w=0, k=5) for s in ("random", "ties", "equal")),
    *(Case(gate=g, w=w) for g in ("v", "none") for w in (0, 10)),
    *(Case(n=n, k=k, w=w) for n, k, w in ((1, 1, 0), (2, 1, 1), (50, 1, 0), (50, 1, 7), (50, 49, 0), (50, 50, 0))),
    *(Case(n=50, k=k, w=w) for k, w in ((10**6, 4), (3, 49), (3, 50), (3, 10**6), (20, 31))),
    *(Case(n=50, g=g, d=d) for g, d in ((1, 80), (3, 32), (4, 80), (3, 80))),
    *(Case(dtype=torch.float16, gate=g, w=w, d=d) for g, w, d in (("kv", 10, 80), ("v", 0, 32), ("none", 5, 32))),
    Case(b=2, hkv=2, n=40, permuted=True),
    Case(b=2, hkv=2, n=40, permuted=True, dtype=torch.float16, scores="ties"),
]
# Segments of 256 (below), so that lists have all their parts, and nodes a parent's alive keys to look at.
LONG = [
    Case(n=700, k=20, w=30, g=1, d=16),
    Case(n=600, k=40, w=0, g=2, d=16, scores="wide"),
    Case(n=600, k=16, w=3, g=1, d=16, scores="slope", hkv=2),
]


def relative_error(got: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Relative to ``floor``, the size of what cancels, where the expected value is zero but for rounding."""
    size = expected.norm().item()
    return (got.double() - expected).norm().item() / (size if size > 1e-3 * floor else floor)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_kernels_agree_with_the_reference(case):
    check(case)


@pytest.mark.parametrize("case", LONG, ids=repr)
def test_several_segments(case, monkeypatch):
    """With two levels of alive lists, as only long sequences have them otherwise."""
    from sparsek_tune.kernel_templates import schedule
    from sparsek_tune.kernel_templates.base import Config

    monkeypatch.setattr(schedule, "FANOUT", 2)
    monkeypatch.setattr(schedule, "STRIDE", 8)
    default = ops._default_configs

    def short(problem):
        configs = dict(default(problem))
        # Narrow blocks of keys: only a whole block of saturated keys takes the loop without mask and gate.
        narrow = {name: Config({**configs[name], "BN": 16}) for name in ("forward", "dq")}
        return {**configs, **narrow, "schedule": Config({**configs["schedule"], "SEGMENT": 256, "BLOCK": 128})}

    monkeypatch.setattr(ops, "_default_configs", short)
    check(case)


def test_a_score_of_minus_infinity_masks_its_key():
    tensors = Case(n=60, k=8, w=4).tensors()
    with torch.no_grad():
        tensors[3][..., 3:9] = float("-inf")
    out = sparsek_attention(*tensors, 8, window=4)
    out.sum().backward()
    assert all(t.isfinite().all() for t in (out, *(t.grad for t in tensors)))
    changed = [t.detach().clone() for t in tensors]
    changed[2][..., 3:9, :] += 100  # once eight other keys are candidates, and these have left the window
    torch.testing.assert_close(sparsek_attention(*changed, 8, window=4)[..., 18:, :], out.detach()[..., 18:, :])


def test_heads_further_apart_than_32_bits():
    """Strides of multi-query attention over a million tokens, in memory that is never touched in between."""
    group, apart = 17, 1 << 27
    key, value, scores = (t.detach() for t in Case(n=8, d=16, dtype=torch.float16).tensors()[1:])
    near = torch.randn(1, group, 8, 16, dtype=torch.float16)
    results = []
    for stride in (8 * 16, apart):
        storage = torch.empty((group - 1) * stride + 8 * 16, dtype=torch.float16)
        query = storage.as_strided(near.shape, (0, stride, 16, 1)).copy_(near).requires_grad_()
        leaves = [query, *(t.clone().requires_grad_() for t in (key, value, scores))]
        out = sparsek_attention(*leaves, 3, window=2)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("size", [1e5, 1e7, 1e30])
def test_very_large_scores_stay_finite(size):
    tensors = Case(n=60, k=8, w=4).tensors()
    with torch.no_grad():
        tensors[3].mul_(size)
    out = sparsek_attention(*tensors, 8, window=4)
    assert out.isfinite().all()
    assert torch.equal(sparsek_select(tensors[3], 8, window=4)[1], reference.select(tensors[3].double(), 8, 4).expiry)


@pytest.mark.parametrize("far", [40, 100, 200])
@pytest.mark.parametrize("kind", ["higher later", "higher first"])
@pytest.mark.parametrize(("k", "w"), [(4, 0), (12, 10)])
def test_logits_far_from_those_of_the_first_keys(far, kind, k, w):
    """exp(far) above or below what the softmax is taken relative to: the sums come near the end of their range (40), or
    leave it and are done again (200)."""
    case = Case(n=70, k=k, w=w, g=1, scores="rising")
    tensors = case.tensors()
    late = torch.arange(70) >= 35
    with torch.no_grad():
        tensors[0][..., 0] = far * 32**0.5
        tensors[1][..., 0] = (late if kind == "higher later" else ~late).float()
    check(case, tensors, tolerance=3e-5)  # float32 rounds a logit of 100 by up to 4e-6


@pytest.mark.parametrize("case", [Case(n=200, k=8, w=100, g=1), Case(n=130, k=12, w=0)], ids=repr)
def test_every_tile_done_again(case, monkeypatch):
    """With a running maximum, over windows that hold whole blocks too."""
    from triton import language as tl

    from sparsek_tune.kernel_templates import forward

    check(case)
    monkeypatch.setattr(forward, "LARGE", tl.constexpr(-1.0))
    check(case)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_that_are_not_positive(scale, dtype):
    check(Case(n=60, dtype=dtype), scale=scale)


def check(case, tensors=None, scale=None, tolerance=None):
    tensors = tensors or case.tensors()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out = sparsek_attention(*tensors, case.k, window=case.w, gate=case.gate, scale=scale)
    expected = reference.sparsek_attention(*exact, case.k, window=case.w, gate=case.gate, scale=scale)
    errors = {"out": relative_error(out.detach(), expected.detach())}
    gen = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=gen).to(case.dtype)
    out.backward(dout)
    expected.backward(dout.double())
    for name, t, e in zip(("query", "key", "value", "scores"), tensors, exact, strict=True):
        if name == "scores" and case.gate == "none":
            assert t.grad is None
        else:
            errors[name] = relative_error(t.grad, e.grad, floor=dout.norm().item())
    assert max(errors.values()) < (tolerance or TOLERANCE[case.dtype]), errors


def test_it_is_the_kernels_that_run(monkeypatch):
    launch, _ = ops._modules()
    seen = []
    for name in ("attention", "attention_backward", "threshold"):
        real = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, real=real, name=name: (seen.append(name), real(*a))[1])
    tensors = Case(n=20).tensors()
    sparsek_attention(*tensors, 3).sum().backward()  # the gradient of sum is expanded, with strides of zero
    sparsek_select(tensors[3], 3)
    assert seen == ["attention", "threshold", "attention_backward", "threshold"]
    seen.clear()
    sparsek_attention(*(t.double() for t in tensors), 3)
    assert not seen


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "rising", "falling"])
@pytest.mark.parametrize("window", [0, 9])
def test_selection_agrees_with_the_reference(kind, window):
    scores = make_scores(kind, (2, 1, 90), torch.Generator().manual_seed(3))
    got, expected = ops.SELECT(scores, 11, window), reference.select(scores.double(), 11, window)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=1e-5)
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # the Function outside of the ops has it
def test_opcheck(permuted):
    args = (*Case(n=20, d=16, permuted=permuted).tensors(), 4, 3, 0.3, "kv")
    torch.library.opcheck(ops.ATTENTION, args)


def test_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: sparsek_attention(*t, 4, window=3) * 2, fullgraph=True, backend="aot_eager")
    a, b = Case(n=30, permuted=True).tensors(), Case(n=30, permuted=True).tensors()
    compiled(*a).sum().backward()
    (sparsek_attention(*b, 4, window=3) * 2).sum().backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(a, b, strict=True))
