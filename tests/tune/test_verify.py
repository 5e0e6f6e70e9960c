"""The judge itself: it must catch what is wrong, and accept what only rounding moved."""

from __future__ import annotations

import pytest
import torch

from sparsek_tune import reference
from sparsek_tune.arguments import check_attention
from sparsek_tune.presets import Shape
from sparsek_tune.problem import Problem
from sparsek_tune.tune import verify
from sparsek_tune.tune.stages import make_inputs
from sparsek_tune.tune.verify import TOLERANCE, compare, expected, interior, reduced, relative_error

P = Problem("fp32", 16, 2, "kv", 12, 8, 61, 2)


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(P, "cpu")


@pytest.fixture(scope="module")
def want(inputs):
    return expected(inputs)


def judge(got, want, inputs, tolerance=TOLERANCE["fp32"]):
    return compare(got, want, tolerance, inputs.scores)


def rounded(want):
    return {n: t.float() if t.dtype.is_floating_point else t.int() for n, t in want.items()}


def test_the_reference_passes_its_own_judgement(inputs, want):
    assert judge(rounded(want), want, inputs) is None
    grads = {"dq", "dk", "dv", "du"}
    assert set(want) == {"out", "lse", *grads, *reference.Selection._fields, *(f"{name}_inherent" for name in grads)}


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "du", "tau"])
def test_one_entry_that_is_not_written_is_caught(inputs, want, name):
    got = rounded(want)
    got[name] = got[name].clone()
    got[name][..., -1] = float("nan")
    assert judge(got, want, inputs).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "du", "tau"])
def test_an_error_above_the_tolerance_is_caught_and_one_below_is_not(inputs, want, name):
    for factor, right in ((1 + 3e-5, False), (1 + 3e-6, True)):
        got = rounded(want)
        got[name] = got[name].double() * factor
        assert (judge(got, want, inputs) is None) == right


@pytest.mark.parametrize("name", ["expiry", "sat_end", "sup_end", "interior"])
def test_a_wrong_entry_of_the_selection_is_caught(inputs, want, name):
    got = rounded(want)
    row = got[name] = got[name].clone()
    # Somewhere in the middle, where a query more or less is no rounding.
    at = int((row[0, 0] < P.n).nonzero()[3]) if name != "interior" else P.n - 1
    row[0, 0, at] += 5 if name != "interior" else 1
    assert judge(got, want, inputs) is not None


@pytest.mark.parametrize("name", ["sat_end", "sup_end"])
def test_entries_out_of_range_are_caught(inputs, want, name):
    for bad in (-(2**30), P.n + 1):
        got = rounded(want)
        got[name] = torch.full_like(got[name], bad)
        assert judge(got, want, inputs) is not None


def test_a_crossing_may_move_where_rounding_decides():
    tau = torch.tensor([[[-torch.inf, -torch.inf, 0.0, 0.0, 0.5, 0.9]]], dtype=torch.float64)
    scores = torch.tensor([[[1.0, 1.0 + 1e-6, 1.4, 3.0, 3.0, 3.0]]])
    # Keys 0 and 1: u - tau is 1 at queries 2 and 3, so sat_end may be 2 to 4; key 2 is at 1.4 there, at 0.9 from 4 on.
    base = torch.tensor([[[2, 2, 4, 6, 6, 6]]])
    other = torch.tensor([[[4, 3, 4, 6, 6, 6]]])
    want = {"sat_end": base, "tau": tau}
    assert compare({"sat_end": other}, want, 1e-5, scores) is None
    for bad in ([5, 2, 4, 6, 6, 6], [1, 2, 4, 6, 6, 6], [2, 2, 3, 6, 6, 6], [2, 2, 4, 5, 6, 6]):
        assert compare({"sat_end": torch.tensor([[bad]])}, want, 1e-5, scores) is not None


def test_interior_counts_the_intervals():
    a = torch.tensor([[0, 2, 3, 5, 5]])
    b = torch.tensor([[2, 5, 3, 5, 5]])
    counted = [[sum(x <= i < y for x, y in zip(a[0].tolist(), b[0].tolist(), strict=True)) for i in range(5)]]
    assert interior(a, b).tolist() == counted


def test_shapes_must_agree(inputs, want):
    got = {**rounded(want), "out": want["out"][..., :-1]}
    assert judge(got, want, inputs).startswith("out: shape")


def test_a_gradient_that_cancels_is_judged_by_an_absolute_floor():
    zero = torch.zeros(1000, dtype=torch.float64)
    assert relative_error(zero + 1e-9, zero) < 1e-5 < relative_error(zero + 1e-7, zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gradient_that_cancels_may_be_off_by_what_a_stored_output_makes_of_it(dtype):
    """One key a query: the softmax is constant, and do * v - do * out is all rounding."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    i = make_inputs(Problem(name, 16, 2, "v", 1, 0, 200, 1), "cpu")
    want = expected(i)
    assert float(want["dq"].abs().max()) < 1e-12
    off = {"dq": want["dq"] + 1.5 * want["dq_inherent"] + 2e-7}
    assert compare(off, want, TOLERANCE[name], i.scores) is None
    wrong = [torch.full_like(want["dq"], 1e-4 if name == "fp32" else 1e-2)]
    if name != "fp32":  # there it is below what float32 leaves of terms that cancel
        wrong.append(want["dq"] + 30 * want["dq_inherent"])
    for dq in wrong:
        assert compare({"dq": dq}, want, TOLERANCE[name], i.scores) is not None
    spoilt = want["dq"].clone()
    spoilt[0, 0, 77] = 0.1
    assert compare({"dq": spoilt}, want, TOLERANCE[name], i.scores).startswith("dq: ")


@pytest.mark.parametrize("copied", [1, 600_000, 1 << 24], ids=["a head at a time", "some at a time", "all at once"])
@pytest.mark.parametrize("head", [3, 7])
@pytest.mark.parametrize("shape", [(1, 8, 100_000), (1, 8, 50_000, 4)])
def test_one_wrong_row_of_many_is_caught(shape, head, copied, monkeypatch):
    monkeypatch.setattr(verify, "_COPIED", copied)
    want = {"dk": torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    got = {"dk": want["dk"].to(torch.bfloat16)}
    assert compare(got, want, TOLERANCE["bf16"], want["dk"]) is None
    got["dk"][0, head, 40_000] = 0
    assert relative_error(got["dk"].double(), want["dk"]) < TOLERANCE["bf16"]
    reason = compare(got, want, TOLERANCE["bf16"], want["dk"])
    assert reason.startswith(f"dk: 1 of {8 * shape[2]} ") and " off, by up to " in reason


@pytest.mark.parametrize("interpreter", [False, True])
@pytest.mark.parametrize(
    "problem",
    [
        Problem("bf16", 128, 4, "kv", 1024, 512, 65536, 8),
        Problem("fp32", 80, 7, "none", 1, 0, 1024, 1),
        Problem("fp16", 64, 1, "v", 4096, 512, 4096, 4),
        Problem("bf16", 64, 1, "kv", 64, 8192, 4096, 4),
        Problem("bf16", 64, 3, "kv", 64, 0, 64, 1024),
    ],
)
def test_small_problems_take_the_same_paths(problem, interpreter):
    small = reduced(problem, interpreter=interpreter)
    assert (small.d, small.g, small.gate) == (problem.d, problem.g, problem.gate)
    assert small.n % 2 == 1 and small.n <= (400 if interpreter else 1500) and small.rows <= 2
    assert (small.w > 0) == (problem.w > 0)
    assert (small.w >= small.n) == (problem.w >= problem.n)
    assert (small.n - small.w <= small.k) == (problem.n - problem.w <= problem.k)
    assert small.dtype == ("fp16" if interpreter and problem.dtype == "bf16" else problem.dtype)


def test_inputs_are_views_of_the_layout_that_models_store():
    i = make_inputs(P, "cpu", "ties")
    assert i.query.shape == (1, 4, 61, 16) and i.key.shape == i.value.shape == (1, 2, 61, 16)
    assert i.query.transpose(1, 2).is_contiguous() and i.scores.shape == (1, 2, 61)
    assert len(i.scores.unique()) <= 5
    assert make_inputs(P, "cpu", "equal").scores.unique().numel() == 1
    assert bool((make_inputs(P, "cpu", "rising").scores.diff(dim=-1) > 0).all())
    assert torch.equal(make_inputs(P, "cpu").query, make_inputs(P, "cpu").query)
    assert abs(float(make_inputs(P._replace(n=4097), "cpu").scores.std()) - 3) < 0.1


@pytest.mark.parametrize("b, rows", [(4096, 32768), (4097, 65535), (8191, 65535)])
def test_inputs_have_no_more_rows_than_the_operators_take(b, rows):
    """Rows are rounded up to powers of two, the most that a grid takes is none."""
    i = make_inputs(Shape(hq=16, hkv=8, b=b, n=32, d=16).problem, "meta")
    assert i.key.shape[1] == i.scores.shape[1] == rows and i.query.shape[1] == 2 * rows
    check_attention(i.query, i.key, i.value, i.scores, i.k, i.window, i.scale, i.gate)
