"""Which cases there are, and the count of pairs against the reference's own selection."""

from __future__ import annotations

import pytest
import torch

from sparsek_tune import reference
from sparsek_tune.bench.cases import LENGTHS, Case, attended, case_of, cases, forward_flops
from sparsek_tune.presets import Shape


@pytest.mark.parametrize(
    ("n", "k", "w"),
    [(50, 7, 0), (50, 7, 9), (50, 1, 1), (50, 80, 0), (50, 80, 12), (50, 5, 50), (50, 5, 99), (1, 1, 0)],
)
def test_attended_counts_what_the_reference_selects(n, k, w):
    u = torch.randn(1, 1, n, generator=torch.Generator().manual_seed(n))
    selection = reference.select(u, k, w)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    chosen = (j + w <= i) & (i < selection.expiry[0, 0])
    window = (j <= i) & (j > i - w)
    assert attended(n, k, w) == int((chosen | window).sum())


def test_flops_by_hand():
    # query 0 sees one key, the three others two; 4 D per pair and head
    assert forward_flops(Shape(hq=3, hkv=1, d=8, n=4, k=2, w=0, b=2)) == 4 * 8 * 3 * 2 * (1 + 2 + 2 + 2)


def test_default_cases_are_the_lengths_under_every_distribution():
    found = cases((), (), ("iid", "slope", "iid"))
    assert len(found) == 2 * len(LENGTHS)
    assert [(c.shape.n, c.shape.k, c.shape.w) for c in found[::2]] == list(LENGTHS)
    assert {(c.shape.hq, c.shape.hkv, c.shape.d, c.shape.dtype, c.shape.gate) for c in found} == {
        (32, 8, 128, "bf16", "kv")
    }
    assert [c.distribution for c in found[:2]] == ["iid", "slope"]


def test_models_run_at_the_default_lengths_and_shapes_replace_them():
    assert {(c.shape.hq, c.shape.d) for c in cases(("gpt2-small", "pythia-160m"), (), ("iid",))} == {(12, 64)}
    (one,) = cases(("gpt2-small",), ("n=512,k=8",), ("iid",))
    assert one.shape == Shape(hq=12, hkv=12, d=64, n=512, k=8)
    with pytest.raises(ValueError, match="must be a whole number"):
        cases((), ("n=many",), ("iid",))


def test_an_entry_gives_its_case_back():
    case = Case(Shape(n=512, gate="v"), "slope")
    assert case_of({"problem": vars(case.shape), "distribution": "slope"}) == case
    assert str(case) == "n=512 k=512 w=512 gate=v slope"
