"""Every kernel on the GPU against the reference in float64, over dtypes, head sizes, groups, gates and edge cases."""

from __future__ import annotations

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from sparsek_tune import ops, reference
from sparsek_tune.ops import sparsek_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 5e-3, FP16: 1e-3, FP32: 1e-5}
HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 7, 8, 16)
GATES = ("kv", "v", "none")
SCORES = ("random", "wide", "ties", "equal", "rising", "falling", "slope")


@dataclass(frozen=True)
class Case:
    """One call. ``scores``: how they run over positions; ``permuted``: storage [B, N, H, D]."""

    d: int = 64
    g: int = 2
    dtype: torch.dtype = FP32
    gate: str = "kv"
    n: int = 1300
    k: int = 100
    w: int = 70
    b: int = 1
    hkv: int = 2
    scores: str = "slope"
    permuted: bool = False

    def tensors(self) -> list[torch.Tensor]:
        gen = torch.Generator("cuda").manual_seed(self.n + self.k)

        def one(heads: int) -> torch.Tensor:
            t = torch.randn(self.b, self.n, heads, self.d, generator=gen, device="cuda").to(self.dtype).transpose(1, 2)
            return (t if self.permuted else t.contiguous()).detach().requires_grad_()

        u = make_scores(self.scores, (self.b, self.hkv, self.n), gen).requires_grad_()
        return [one(self.g * self.hkv), one(self.hkv), one(self.hkv), u]


def make_scores(kind: str, shape: tuple[int, ...], gen: torch.Generator) -> torch.Tensor:
    noise, at = torch.randn(shape, generator=gen, device="cuda"), torch.arange(shape[-1], device="cuda")
    return {
        "random": noise,
        "wide": 20 * noise,
        "ties": (2 * noise).round() / 2,
        "equal": torch.full(shape, 0.25, device="cuda"),
        "rising": (at / 64).expand(shape).clone(),
        "falling": (at / -64).expand(shape).clone(),
        "slope": noise + 1e-3 * at,
    }[kind]


def relative_error(got: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Relative to ``floor``, the size of what cancels, where the expected value is zero but for rounding."""
    size = expected.norm().item()
    return (got.double() - expected).norm().item() / (size if size > 1e-3 * floor else floor)


def errors(case: Case) -> dict[str, float]:
    """Relative error of the output and of every gradient."""
    tensors = case.tensors()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out = sparsek_attention(*tensors, case.k, window=case.w, gate=case.gate)
    expected = reference.sparsek_attention(*exact, case.k, window=case.w, gate=case.gate)
    gen = torch.Generator("cuda").manual_seed(1)
    dout = torch.randn(out.shape, generator=gen, device="cuda").to(case.dtype)
    out.backward(dout)
    expected.backward(dout.double())
    found = {"out": relative_error(out.detach(), expected.detach())}
    for name, t, e in zip(("query", "key", "value", "scores"), tensors, exact, strict=True):
        if name == "scores" and case.gate == "none":
            assert t.grad is None
        else:
            found[name] = relative_error(t.grad, e.grad, floor=dout.norm().item())
    return found


def check(case: Case) -> None:
    found = errors(case)
    assert all(error < TOLERANCE[case.dtype] for error in found.values()), (case, found)  # fails for NaN too


def shapes() -> dict[str, list[Case]]:
    """Every (head size, dtype), (head size, gate), (group, dtype) and (dtype, gate), in 21 cases; each again at another
    length, budget and window, from storage [B, N, H, D]."""
    found = {}
    for (a, d), (b, dtype) in itertools.product(enumerate(HEAD_SIZES), enumerate((BF16, FP16, FP32))):
        group = (a + b) % len(GROUPS)
        case = Case(d, GROUPS[group], dtype, GATES[(a + 2 * b) % 3])
        found[f"d{d}-g{case.g}-{dtype}-{case.gate}"] = [
            case,
            replace(case, n=517, k=37, w=200, b=2, permuted=True, scores="random"),
        ]
    return found


def without_a_window() -> dict[str, list[Case]]:
    choice = (
        (32, 3, FP32, "kv"),
        (80, 2, BF16, "kv"),
        (64, 4, FP16, "v"),
        (128, 4, BF16, "kv"),
        (128, 7, FP16, "none"),
        (192, 1, BF16, "v"),
        (256, 2, BF16, "kv"),
    )
    cases = [Case(d, g, dtype, gate, n=700, w=0) for d, g, dtype, gate in choice]
    return {f"no-window-d{c.d}-g{c.g}-{c.dtype}-{c.gate}": [c, replace(c, n=65, k=1000)] for c in cases}


def score_kinds() -> dict[str, list[Case]]:
    found = {}
    for kind, dtype in itertools.product(
        ("random", "wide", "ties", "equal", "rising", "falling", "slope"), (FP32, BF16)
    ):
        base = Case(32, dtype=dtype, scores=kind)
        lengths = [(640, 1, 33), (1100, 300, 16), (1100, 299, 0), (2100, 600, 5)]
        # One key and a steep gate: du is a difference of nearly equal terms, so that the rounding of one gate to
        # bfloat16, which other keys would average out, is most of it.
        if (kind, dtype) != ("wide", BF16):
            lengths.append((640, 1, 0))
        cases = [replace(base, n=n, k=k, w=w) for n, k, w in lengths]
        found[f"{kind}-{dtype}"] = [*cases, replace(base, n=641, k=64, w=64, b=2, hkv=1)]
    return found


def lengths() -> dict[str, list[Case]]:
    """Budgets and windows around the length, where sets are empty, whole or one short of it."""
    found = {}
    for n, gate in itertools.product((1, 2, 3, 15, 16, 17, 63, 129, 511, 512, 513, 1025), GATES):
        near = (
            (1, 0),
            (n, 0),
            (max(1, n - 1), 0),
            (10 * n, 3),
            (1, n),
            (2, n - 1),
            (5, 10 * n),
            (2**31 - 1, 2**31 - 1),
        )
        found[f"n{n}-{gate}"] = [Case(32, n=n, k=k, w=w, gate=gate, scores="ties") for k, w in near]
    return found


def long_lives() -> dict[str, list[Case]]:
    """Keys that all later segments have, more than dkv's reduction looks for at a time."""
    base = Case(n=6000, scores="falling")
    return {"twelve-segments": [base, replace(base, w=0, dtype=BF16), replace(base, n=3000, k=512, d=128, dtype=BF16)]}


CASES = {**shapes(), **without_a_window(), **score_kinds(), **lengths(), **long_lives()}


@pytest.fixture(scope="module")
def compiled(request):
    """Compile in parallel what the selected tests would compile one after the other: most of the suite's time."""

    def run(case: Case) -> None:
        tensors, options = [t.detach() for t in case.tensors()], (case.k, case.w, 0.1, case.gate)
        out, *saved = ops.ATTENTION(*tensors, *options)
        ops.ATTENTION_BACKWARD(out, *tensors, out, *saved, *options)

    names = [item.callspec.params["name"] for item in request.session.items if "compiled" in item.fixturenames]
    cases = [case for name in names for case in CASES[name]]
    random.Random(0).shuffle(cases)  # neighbours share kernels
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, cases))


def test_shapes_cover_all_pairs():
    cases = [cases[0] for cases in shapes().values()]
    for first, second, count in (("d", "dtype", 21), ("d", "gate", 21), ("g", "dtype", 21), ("dtype", "gate", 9)):
        assert len({(getattr(c, first), getattr(c, second)) for c in cases}) == count


@pytest.mark.parametrize("name", CASES)
def test_attention(name, compiled, poison):
    for case in CASES[name]:
        check(case)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_strides(dtype):
    """A last dimension that is not contiguous, a fused projection, scores from a linear map, an expanded gradient."""
    b, n, g, hkv, d = 2, 300, 2, 2, 64
    fused = torch.randn(b, n, (g + 2) * hkv, d, device="cuda", dtype=dtype)
    query, key, value = fused.transpose(1, 2).split((g * hkv, hkv, hkv), dim=1)
    value = value.transpose(2, 3).contiguous().transpose(2, 3)
    scores = torch.randn(b, n, hkv, device="cuda").transpose(1, 2)
    results = []
    for tensors in ([query, key, value, scores], [t.contiguous() for t in (query, key, value, scores)]):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = sparsek_attention(*leaves, 20, window=10)
        out.sum().backward()
        results.append([out, *(t.grad for t in leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("w", [0, 70])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_query_that_sees_one_key_has_no_gradient(dtype, w):
    """Its softmax is constant: what is left would be the rounding of a weight that ought to be 1."""
    query, *others = Case(d=128, dtype=dtype, w=w).tensors()
    out = sparsek_attention(query, *others, 100, window=w)
    out.backward(torch.randn_like(out))
    assert query.grad[:, :, 0].abs().max() < 1e-4 * query.grad[:, :, 1].abs().max()


@pytest.mark.parametrize("far", [40, 85, 200])
@pytest.mark.parametrize("higher", ["first", "later"])
@pytest.mark.parametrize("w", [0, 70])
def test_logits_far_from_those_of_the_first_keys(far, higher, w):
    """exp(far) above or below what a tile's softmax is taken relative to: within the range of its sums (40), or beyond,
    so that it is done again (200)."""
    case = Case(d=128, g=4, dtype=BF16, n=1300, w=w, gate="v")
    tensors = case.tensors()
    late = torch.arange(case.n, device="cuda") >= case.n // 2
    with torch.no_grad():
        tensors[0][..., 0] = far * 128**0.5
        tensors[1][..., 0] = (late if higher == "later" else ~late).to(BF16)
        tensors[3].copy_(torch.arange(case.n, device="cuda") / 64)
    out = sparsek_attention(*tensors, case.k, window=w, gate="v")
    exact = reference.attention_forward(*(t.detach().double() for t in tensors), case.k, w, 128**-0.5, "v")
    assert relative_error(out, exact[0]) < TOLERANCE[BF16]


# Stages, each through its own launch function


def stages(case: Case):
    from sparsek_tune import dispatch, launch

    tensors = [t.detach() for t in case.tensors()]
    configs = dispatch.configs(ops.problem_of(*tensors[:2], case.k, case.w, case.gate), 0)
    return launch, tensors, configs


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(
    ("n", "k", "w"),
    [(5000, 512, 128), (3001, 1, 0), (3001, 1000, 77), (100, 99, 0), (20000, 512, 0), (33500, 512, 100)],
)
def test_threshold(scores, n, k, w, poison):
    launch, (*_, u), configs = stages(Case(n=n, k=k, w=w, scores=scores))
    got, expected = launch.threshold(u, k, w, configs["threshold"]), reference.select(u.double(), k, w)
    torch.testing.assert_close(got.tau.double(), expected.tau, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.expiry, expected.expiry)
    for name in ("sat_end", "sup_end", "interior"):  # tau is rounded: a key at the very edge may fall on either side
        differ = getattr(got, name) != getattr(expected, name)
        assert differ.float().mean() < 1e-3, name


@pytest.mark.parametrize("scores", ["random", "ties", "rising", "falling"])
@pytest.mark.parametrize(("n", "k", "w"), [(3000, 300, 100), (3000, 2000, 0), (600, 1, 50)])
def test_schedule_lists_what_each_query_selects(scores, n, k, w, poison):
    launch, (*_, u), configs = stages(Case(n=n, k=k, w=w, scores=scores, hkv=1))
    selection = launch.threshold(u, k, w, configs["threshold"])
    lists = launch.schedule(u, selection, k, w, configs["schedule"])
    expiry = selection.expiry.flatten()
    j = torch.arange(n, device="cuda")
    for i in [*range(0, n, 97), n - 1]:
        segment = i // lists.segment
        keys, late = lists.keys[0, segment], lists.bounds[0, segment, 3]  # where those dropped inside begin
        parts = keys[lists.start[0, i] : lists.stop[0, i]], keys[late : lists.late_stop[0, i]]
        listed = torch.cat(parts).long()
        assert listed.unique().numel() == listed.numel()
        alive = listed[(listed + w <= i) & (expiry[listed] > i)]
        assert torch.equal(alive.sort().values, j[(j + w <= i) & (expiry > i)])


def test_backward_intermediates(poison):
    case = Case(n=900, k=80, w=30, g=3)
    launch, (q, key, v, u), configs = stages(case)
    selection = launch.threshold(u, case.k, case.w, configs["threshold"])
    lists = launch.schedule(u, selection, case.k, case.w, configs["schedule"])
    out, lse = launch.forward(q, key, v, selection, lists, case.w, 0.2, "kv", configs["forward"])
    exact = reference.attention_forward(*(t.double() for t in (q, key, v, u)), case.k, case.w, 0.2, "kv")
    assert relative_error(lse, exact[1]) < 1e-6
    dout = torch.randn_like(out)
    _, delta, gbar = launch.dq(dout, q, key, v, u, out, lse, selection, lists, case.w, 0.2, "kv", configs["dq"])
    assert relative_error(delta, (dout.double() * exact[0]).sum(-1)) < 1e-5
    assert torch.isfinite(gbar).all()
    assert (gbar[selection.interior == 0] == 0).all()


@pytest.mark.parametrize(
    "case",
    [Case(128, 4, BF16, n=1100), Case(80, 3, FP16, n=700), Case(64, 2, BF16, n=700, w=0), Case(32, n=700)],
    ids=repr,
)
@pytest.mark.parametrize("template", ["threshold", "schedule", "forward", "dq", "dkv"])
def test_other_configs(case, template, poison):
    """Not the default alone: a sample of every template's space gives the same answers."""
    from sparsek_tune import dispatch
    from sparsek_tune.kernel_templates import TEMPLATES
    from sparsek_tune.problem import current_device

    problem = ops.problem_of(*case.tensors()[:2], case.k, case.w, case.gate)
    feasible = list(TEMPLATES[template].feasible(problem, current_device()))
    for config in random.Random(template + repr(case)).sample(feasible, min(2, len(feasible))):
        with dispatch.override({template: config}):
            check(case)
