"""The sampled check agrees with the reference where that can be run, and sees what is wrong."""

from __future__ import annotations

import pytest
import torch

from sparsek_tune import dispatch
from sparsek_tune.bench import check, inputs, ours
from sparsek_tune.bench.cases import Case
from sparsek_tune.presets import Shape
from sparsek_tune.tune import sample
from sparsek_tune.tune.verify import expected


def case(gate="kv", w=12, n=150, k=20, scores="iid"):
    return Case(Shape(hq=4, hkv=2, d=16, n=n, k=k, w=w, dtype="fp32", gate=gate, b=2), scores)


@pytest.mark.parametrize("gate", ["kv", "v", "none"])
@pytest.mark.parametrize(("w", "k"), [(12, 20), (0, 20), (200, 20), (12, 400)])
def test_samples_are_what_the_reference_gives(gate, w, k):
    i = inputs.make(case(gate, w, k=k), 0, "cpu")
    want = expected(i)
    at = sample.sample_queries(150, 3)
    got = sample.expected_queries(i, at)
    for name in ("out", "lse", "dq"):
        assert torch.allclose(got[name], want[name][:, :, at], rtol=1e-9, atol=1e-9), name
    found = ours.Results(want["out"], want["lse"], want["tau"], want["expiry"])
    keys = sample.sample_keys(want["expiry"], 3)
    for name, x in sample.expected_keys(i, found, keys).items():
        assert torch.allclose(x, want[name][keys], rtol=1e-9, atol=1e-9), name


def test_ties_go_to_the_smaller_index():
    i = inputs.make(case(w=0), 0, "cpu")
    i = i._replace(scores=i.scores.round().clamp(-1, 1))
    at = torch.tensor([100, 149])
    assert torch.allclose(sample.expected_queries(i, at)["out"], expected(i)["out"][:, :, at])


def test_sampled_keys_are_seen_by_somebody():
    expiry = torch.tensor([[[0, 1, 9, 3, 4, 9, 6, 7, 8]]])  # only keys 2 and 5 live
    assert set(sample.sample_keys(expiry, 0)[2].tolist()) <= {2, 5}


@pytest.mark.parametrize(("batch", "heads", "sampled"), [(2, 3, 6), (300, 20, sample.HEADS)])
def test_keys_of_so_many_heads_are_sampled(batch, heads, sampled):
    life = torch.arange(batch * heads).view(batch, heads, 1) % 7  # the key that lives, by head
    expiry = torch.arange(7) + (torch.arange(7) == life)
    b, h, j = sample.sample_keys(expiry, 0)
    assert torch.equal(j, life[b, h, 0])
    of_heads = (b * heads + h).unique(return_counts=True)[1].tolist()
    assert of_heads == [sample.KEYS] * sampled


@pytest.mark.parametrize("gate", ["kv", "none"])
def test_the_operator_passes(gate):
    i = inputs.make(case(gate), 0, "cpu")
    verdict = check.at_length(i, "fp32", 0)
    assert verdict.reason is None and set(verdict.errors) == {"out", "lse", "dq", "dk", "dv"}
    assert 0 < max(verdict.errors.values()) < 1e-5
    assert set(check.at_length(i, "fp32", 0, backward=False).errors) == {"out", "lse"}


WRONG = {
    "out": lambda r: r._replace(out=r.out * 1.01),
    "lse": lambda r: r._replace(lse=r.lse + 0.1),
    "dk": lambda r: r._replace(tau=r.tau + 0.05),
    "dv": lambda r: r._replace(tau=r.tau + 0.05),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_forward_result_is_seen(name, monkeypatch):
    i, right = inputs.make(case(), 0, "cpu"), ours.results
    monkeypatch.setattr(ours, "results", lambda i: WRONG[name](right(i)))
    verdict = check.at_length(i, "fp32", 0)
    assert f"{name}: relative error" in str(verdict.reason)


@pytest.mark.parametrize(("at", "name"), [(0, "dq"), (1, "dk"), (2, "dv")])
def test_a_wrong_gradient_is_seen(at, name, monkeypatch):
    i, right = inputs.make(case(), 0, "cpu"), ours.forward_backward

    def wrong(i):
        grads = list(right(i)())
        grads[at] = grads[at] * 0.99
        return lambda: tuple(grads)

    monkeypatch.setattr(ours, "forward_backward", wrong)
    assert check.at_length(i, "fp32", 0).reason.startswith(f"{name}: relative error 1.00e-02")


def test_nan_is_seen(monkeypatch):
    i, right = inputs.make(case(), 0, "cpu"), ours.results
    monkeypatch.setattr(ours, "results", lambda i: right(i)._replace(out=right(i).out * float("nan")))
    assert "out" in str(check.at_length(i, "fp32", 0).reason)


@pytest.mark.parametrize(("peaked", "most"), [(1, 5e-3), (30, 3e-2)])
def test_dq_may_be_as_far_off_as_rounded_results_make_it(peaked, most, monkeypatch):
    i = inputs.make(Case(Shape(hq=4, hkv=2, d=64, n=300, k=40, w=0, dtype="bf16"), "iid"), 0, "cpu")
    i = i._replace(query=peaked * i.query)
    verdict, right = check.at_length(i, "bf16", 0), ours.forward_backward
    assert verdict.reason is None
    assert verdict.tolerance == most if peaked == 1 else 5e-3 < verdict.tolerance < most

    def wrong(i):
        dq, *others = right(i)()
        return lambda: (dq * (1 + 1.5 * verdict.tolerance), *others)

    monkeypatch.setattr(ours, "forward_backward", wrong)
    assert str(check.at_length(i, "bf16", 0).reason).startswith("dq: relative error")


@pytest.mark.parametrize("gate", ["kv", "none"])
def test_reduced_length_covers_the_gradient_of_the_scores(gate, device, monkeypatch):
    problem = case(gate, n=4096, k=512).shape.problem
    configs = dispatch.resolve(problem, device).configs
    verdict = check.at_reduced_length(problem, configs, "cpu", 0)
    assert verdict.reason is None and ("du" in verdict.errors) == (gate != "none")
    right = ours.forward_backward
    monkeypatch.setattr(ours, "forward_backward", lambda i: lambda: tuple(g * 1.001 for g in right(i)()))
    assert "relative error" in str(check.at_reduced_length(problem, configs, "cpu", 0).reason)
