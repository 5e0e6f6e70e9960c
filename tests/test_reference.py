"""Selection and projection against definitions written in other ways: exact prefixes, heaps, finite differences."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_tune import reference
from sparsek_tune.reference import Selection, gates, select, sparsek, sparsek_attention

# (N, k, window): each edge of the definition once.
SHAPES = [
    (1, 1, 0), (1, 1, 1), (1, 3, 5), (2, 1, 0), (24, 1, 0), (24, 1, 3), (24, 5, 0), (24, 4, 1), (25, 6, 7), (24, 23, 0),
    (24, 24, 0), (24, 40, 2), (24, 3, 20), (24, 3, 21), (24, 3, 23), (24, 3, 24), (24, 3, 99),
]  # fmt: skip


# ---- Selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", oracles.KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_is_the_definition(kind: str, shape: tuple[int, int, int]):
    n, k, window = shape
    scores = oracles.make_scores(kind, (2, 1, n))
    got = select(scores, k, window)
    for b in range(2):
        p = oracles.prefixes(scores[b, 0], k, window)
        torch.testing.assert_close(got.tau[b, 0], p.tau, rtol=1e-14, atol=1e-14)
        for name, want in zip(Selection._fields[1:], oracles.first_queries(p, window), strict=True):
            assert torch.equal(getattr(got, name)[b, 0], want), name
        m = (scores[b, 0] - p.tau[:, None]).clamp(0, 1) * p.selected
        torch.testing.assert_close(gates(scores, got, window)[b, 0], m, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["integer", "quarters", "equal", "rising_steps"])
def test_thresholds_that_a_float_can_hold_are_exact(kind: str):
    scores = oracles.make_scores(kind, (1, 1, 60), seed=3)
    tau = select(scores, 7, 4).tau[0, 0]
    want = oracles.prefixes(scores[0, 0], 7, 4).tau
    dyadic = want.isfinite() & (want * 2**20 == (want * 2**20).floor())
    assert dyadic.sum() > 5 and torch.equal(tau[dyadic], want[dyadic])


@pytest.mark.parametrize("kind", ["normal", "integer", "rising", "huge", "tiny"])
@pytest.mark.parametrize(("k", "window"), [(64, 0), (64, 100), (1, 3), (500, 1)])
def test_select_is_what_a_stream_keeps(kind: str, k: int, window: int):
    n = 1500
    scores = oracles.make_scores(kind, (1, 1, n), seed=1)
    u = scores.flatten().tolist()
    got = select(scores, k, window)
    want = torch.tensor([-math.inf] * window + oracles.stream_tau(u[: n - window], k), dtype=torch.float64)
    torch.testing.assert_close(got.tau[0, 0], want, rtol=1e-12, atol=1e-9)
    assert (got.tau[..., 1:] >= got.tau[..., :-1]).all()
    assert got.expiry[0, 0].tolist() == oracles.stream_expiry(u, k, window)


def test_select_does_not_depend_on_the_blocks(monkeypatch):
    scores = torch.cat([oracles.make_scores(kind, (1, 3, 200)) for kind in ("normal", "quarters", "rising")])
    want = select(scores, 20, 5)
    for block in (1, 5000, 100_000):
        monkeypatch.setattr(reference, "BLOCK", block)
        got = select(scores, 20, 5)
        torch.testing.assert_close(got.tau, want.tau, rtol=1e-14, atol=1e-14)
        assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


def test_rounding_never_lowers_the_threshold(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 20_000)  # blocks sum over other breakpoints, so they round otherwise
    for seed in range(20):
        tau = select(oracles.make_scores("normal", (1, 1, 400), seed), 100, 0).tau
        assert (tau[..., 1:] >= tau[..., :-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_select_solves_in_float64_whatever_the_dtype(dtype: torch.dtype):
    scores = (3 * oracles.make_scores("normal", (2, 3, 300))).to(dtype)
    got, want = select(scores, 30, 10), select(scores.double(), 30, 10)
    assert got.tau.dtype == torch.float32 and want.tau.dtype == torch.float64
    assert torch.equal(got.tau, want.tau.float())
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b)


def test_select_treats_rows_apart_and_takes_any_strides():
    scores = oracles.make_scores("normal", (3, 50, 2)).transpose(1, 2)
    got = select(scores, 5, 2)
    alone = select(scores[1:2, 1:2].contiguous(), 5, 2)
    assert all(torch.equal(x[1:2, 1:2], y) for x, y in zip(got, alone, strict=True))


@pytest.mark.parametrize("huge", [math.inf, 1e300, 3e38, 2.0**40])
def test_scores_without_bound_are_saturated_or_lose(huge: float):
    scores = oracles.make_scores("normal", (1, 1, 40))
    scores[..., 3::7], scores[..., 5::7] = huge, -huge
    got = select(scores, 3, 0)
    first, second = slice(11, 17), slice(25, 40)  # behind the second, and the fourth, key of +huge
    u = scores[0, 0].tolist()
    rest = [oracles.threshold([Fraction(x) for x in u[: i + 1] if abs(x) < 100], 1) for i in range(11, 17)]
    want = torch.tensor([math.nan if t is None else float(t) for t in rest], dtype=torch.float64)
    torch.testing.assert_close(got.tau[0, 0, first], want)  # one place is left to the scores with a bound
    assert got.expiry[0, 0, [3, 10, 17]].tolist() == [40] * 3
    m = gates(scores, got, 0)[0, 0]
    assert not m.isnan().any() and (m[second][:, [3, 10, 17]] == 1).all() and (m[second].sum(-1) == 3).all()
    assert (got.tau[0, 0, second] == huge - 1).all()
    assert (got.sat_end <= got.sup_end).all() and (got.expiry <= got.sup_end).all() and (got.interior >= 0).all()


@pytest.mark.parametrize("value", [2.0**40, -(2.0**40), 1e300, math.inf, -math.inf])
def test_equal_scores_without_bound_select_whole_keys(value: float):
    got = select(torch.full((1, 1, 9), value, dtype=torch.float64), 3, 0)
    assert (got.tau[..., 3:] == value - 1).all() and not got.interior.any()
    assert got.expiry[0, 0].tolist() == [9, 9, 9, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("seed", range(8))
def test_a_gap_of_exactly_one_is_hard_whatever_stands_above_it(seed: int):
    # The twenty best end in 1, the next is 0: tau = 0 to the bit, although the sum above it is rounded.
    best = 1 + 3 * oracles.make_scores("normal", (20,), seed).abs()
    rest = -oracles.make_scores("normal", (20,), seed + 100).abs()
    best[7], rest[11] = 1, 0
    got = select(torch.cat([best, rest])[None, None], 20, 0)
    assert (got.tau[..., 31:] == 0).all() and not got.interior[..., 31:].any()
    assert got.sat_end[0, 0, 7] == 40 and got.sup_end[0, 0, 31] == 31


def test_nan_scores_do_not_crash():
    scores = oracles.make_scores("normal", (1, 2, 40))
    scores[..., ::3] = math.nan
    for x in select(scores, 3, 2)[1:4]:
        assert ((x >= 0) & (x <= 40)).all()


# Multiples of 2**-16 below 2**8: differences and sums are exact, so shifts and boundaries are too.
DYADIC = st.one_of(st.integers(-4, 4).map(float), st.integers(-(2**24), 2**24).map(lambda i: i / 2**16))
ROWS = st.lists(DYADIC, min_size=1, max_size=20)


@settings(max_examples=120, deadline=None)
@given(u=ROWS, k=st.integers(1, 8), window=st.integers(0, 6))
def test_select_properties(u: list[float], k: int, window: int):
    scores = torch.tensor(u, dtype=torch.float64)
    n = len(u)
    got = Selection(*(x[0, 0] for x in select(scores[None, None], k, window)))
    i, j = torch.arange(n)[:, None], torch.arange(n)
    candidate = j + window <= i
    size = candidate.sum(-1)
    selected = candidate & (i < got.expiry)
    assert torch.equal(selected.sum(-1), size.clamp(max=k))  # |S_i| = min(k, |C_i|)
    ranked = torch.where(candidate, scores, -math.inf).sort(-1, descending=True).values
    kappa = torch.where(selected, scores, math.inf).min(-1).values
    enough = size > k
    assert torch.equal(kappa[enough], ranked[enough, min(k, n) - 1])
    assert (kappa[enough].diff() >= 0).all() and (got.tau[1:] >= got.tau[:-1]).all()  # both are monotone
    before_cut = (scores - got.tau[:, None]).clamp(0, 1) * candidate
    torch.testing.assert_close(before_cut.sum(-1), size.clamp(max=k).double(), rtol=0, atol=1e-9)
    assert (got.tau[enough] >= kappa[enough] - 1).all() and (got.tau[enough] < kappa[enough]).all()
    dropped = candidate & ~selected  # a dropped key never returns
    assert torch.equal(dropped, dropped.cummax(0).values)
    assert torch.equal(got.interior, ((got.sat_end <= i) & (i < got.sup_end)).sum(-1).int())
    assert (got.expiry <= got.sup_end).all() and (got.sat_end <= got.sup_end).all()


@settings(max_examples=60, deadline=None)
@given(u=ROWS, k=st.integers(1, 8), window=st.integers(0, 6), shift=st.integers(-64, 64).map(lambda i: i / 4))
def test_select_is_translation_invariant(u: list[float], k: int, window: int, shift: float):
    scores = torch.tensor(u, dtype=torch.float64)[None, None]
    here, there = select(scores, k, window), select(scores + shift, k, window)
    torch.testing.assert_close(there.tau, here.tau + shift, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(here[1:], there[1:], strict=True))


@settings(max_examples=100, deadline=None)
@given(u=ROWS, k=st.integers(1, 8), window=st.integers(0, 6))
def test_select_is_the_definition_for_any_dyadic_scores(u: list[float], k: int, window: int):
    got = select(torch.tensor(u, dtype=torch.float64)[None, None], k, window)
    p = oracles.prefixes(torch.tensor(u, dtype=torch.float64), k, window)
    torch.testing.assert_close(got.tau[0, 0], p.tau, rtol=1e-13, atol=1e-13)
    for name, want in zip(Selection._fields[1:], oracles.first_queries(p, window), strict=True):
        assert torch.equal(getattr(got, name)[0, 0], want), name


# ---- The bare projection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", oracles.KINDS)
@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 1), (9, 1), (9, 4), (9, 8), (9, 9), (9, 20), (40, 13)])
def test_sparsek_is_the_projection(kind: str, size: int, k: int):
    z = oracles.make_scores(kind, (3, size), seed=2).requires_grad_()
    g = oracles.make_scores("normal", (3, size), seed=9)
    p = sparsek(z, k)
    (dz,) = torch.autograd.grad(p, z, g)
    for row in range(3):
        exact = [Fraction(x) for x in z[row].tolist()]
        tau = oracles.threshold(exact, k)
        want = [1.0 if tau is None else float(min(max(x - tau, 0), 1)) for x in exact]
        torch.testing.assert_close(p[row].detach(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-11)
        inside = torch.tensor([tau is not None and 0 < x - tau < 1 for x in exact])
        want = torch.where(inside, g[row] - g[row][inside].mean(), 0.0)
        torch.testing.assert_close(dz[row], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [1, 3, 0.5, 2.5, 6.75, 7])
def test_sparsek_gradients(k: float):
    z = oracles.make_scores("normal", (2, 7, 3), seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sparsek(z, k, 1), z)
    assert torch.autograd.gradgradcheck(lambda z: sparsek(z, k, 1), z)
    torch.testing.assert_close(sparsek(z, k, 1).sum(1), torch.full((2, 3), min(k, 7), dtype=torch.float64))


@settings(max_examples=100, deadline=None)
@given(z=ROWS, k=st.one_of(st.integers(1, 12), st.floats(0.01, 12)), shift=st.integers(-64, 64).map(lambda i: i / 4))
def test_sparsek_properties(z: list[float], k: float, shift: float):
    x = torch.tensor(z, dtype=torch.float64)
    p = sparsek(x, k)
    assert p.sum().item() == pytest.approx(min(k, len(z)), abs=1e-9)
    assert ((p >= 0) & (p <= 1)).all()
    torch.testing.assert_close(sparsek(x + shift, k), p, rtol=0, atol=1e-11)
    # Optimality: no feasible move of mass between two elements comes nearer to x.
    gap = x - p
    assert not (p < 1).any() or not (p > 0).any() or gap[p < 1].max() <= gap[p > 0].min() + 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sparsek_along_any_dimension_in_any_dtype(dtype: torch.dtype):
    z = oracles.make_scores("normal", (4, 9, 5)).to(dtype).transpose(0, 2).requires_grad_()
    for dim in (0, 1, 2, -1, -2):
        p = sparsek(z, 2, dim)
        want = torch.stack([sparsek(row.double(), 2) for row in z.movedim(dim, -1).reshape(-1, z.shape[dim])])
        assert p.dtype == dtype and p.shape == z.shape
        assert torch.equal(p.movedim(dim, -1).reshape(want.shape), want.to(dtype))
        (dz,) = torch.autograd.grad(p.double().square().sum(), z)
        assert dz.dtype == dtype and dz.shape == z.shape and dz.any()


def test_sparsek_of_nothing_and_of_infinities():
    assert sparsek(torch.zeros(0, 4), 2).shape == (0, 4)
    assert sparsek(torch.zeros(3, 0), 2).shape == (3, 0)
    z = torch.tensor([math.inf, 0.5, 0.25, -math.inf])
    assert sparsek(z, 2).tolist() == [1, 0.625, 0.375, 0]
    assert sparsek(z, 4).tolist() == [1, 1, 1, 1]


def test_sparsek_under_compile():
    z = oracles.make_scores("normal", (4, 30)).requires_grad_()
    weight = oracles.make_scores("normal", (4, 30), seed=1)
    (want,) = torch.autograd.grad((sparsek(z, 5) * weight).sum(), z)
    compiled = torch.compile(lambda z: (sparsek(z, 5) * weight).sum(), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(z), z)
    assert torch.equal(got, want)


# ---- Arguments ------------------------------------------------------------------------------------------------------

HALF: Any = 1.5
Z = torch.zeros(2, 3)
U = torch.zeros(1, 2, 6)
Q, K = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparsek([1.0], 1), TypeError, "z must be a floating point tensor, but is"),
        (lambda: sparsek(Z.int(), 1), TypeError, "z must be a floating point tensor, but is torch.int32"),
        (lambda: sparsek(Z, 0), ValueError, "k must be positive and finite, but is 0"),
        (lambda: sparsek(Z, math.nan), ValueError, "k must be positive and finite, but is nan"),
        (lambda: sparsek(Z, True), TypeError, "k must be an int or a float, but is True"),
        (lambda: sparsek(Z, 1, 2), ValueError, r"dim must be in \[-2, 2\) .* but is 2"),
        (lambda: select(U[0], 1, 0), ValueError, r"scores must be \[B, Hkv, N\], no size 0, but .* \[2, 6\]"),
        (lambda: select(U[..., :0], 1, 0), ValueError, "scores must be"),
        (lambda: select(U.long(), 1, 0), TypeError, "scores must be a floating point tensor"),
        (lambda: select(U, 0, 0), ValueError, "k must be at least 1, but is 0"),
        (lambda: select(U, HALF, 0), TypeError, "k must be an int, but is 1.5"),
        (lambda: select(U, 1, -1), ValueError, "window must be at least 0, but is -1"),
        (lambda: sparsek_attention(Q, K, K, U, 0), ValueError, "k must be at least 1"),
        (lambda: sparsek_attention(Q[:, :3], K, K, U, 1), ValueError, "query must be .* multiple of 2"),
        (lambda: sparsek_attention(Q, K[:, :1], K, U, 1), ValueError, r"key must be of shape \[1, 2, 6, 8\], but"),
        (lambda: sparsek_attention(Q, K, K[..., :7], U, 1), ValueError, r"value must be of shape \[1, 2, 6, 8\], but"),
        (lambda: sparsek_attention(Q, K, K, U[..., :5], 1), ValueError, r"scores must be of shape \[1, 2, 6\], but"),
        (lambda: sparsek_attention(Q, K.int(), K, U, 1), TypeError, "key must be a floating point tensor"),
        (lambda: sparsek_attention(Q, K, K, U, 1, gate="k"), ValueError, "gate must be one of 'kv', 'v', 'none', but"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
