"""Threshold and schedule in Triton's interpreter, cut so finely that short rows take every path of long ones."""

from __future__ import annotations

import itertools
import os
from unittest import mock

import pytest
import torch

from sparsek_tune import launch, reference
from sparsek_tune.kernel_templates import filter as filter_t
from sparsek_tune.kernel_templates import schedule, threshold
from sparsek_tune.kernel_templates.base import Config

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]

LIMIT = 2.0**20  # where threshold clamps
SCORES = {
    "random": lambda x, at: 3 * x,
    "ties": lambda x, at: (2 * x).round() / 2,
    "equal": lambda x, at: 0 * x + 0.25,
    "nearly equal": lambda x, at: 1e-8 * x,  # F is nearly whole numbers: nothing less than all bits tells
    "rising": lambda x, at: at / 8,
    "steep": lambda x, at: 8.0 * at,
    "falling": lambda x, at: -at / 8,
    "slope": lambda x, at: x + 1e-3 * at,
    "all dropped at once": lambda x, at: torch.where(at < at.numel() // 2, 0.0, 1000.0),
    "all cut at once, at the root": lambda x, at: torch.where((at < 30) | (at == 70), 1000.0, 0.0),
    "a denser half": lambda x, at: torch.where(at < at.numel() // 2, x, 0.01 * x + 3),
    "signed zeros": lambda x, at: (0 * at).copysign(x),
    "minus infinity": lambda x, at: torch.where(x > 0, x, float("-inf")),
    "huge": lambda x, at: 1e30 * x,
}
# Several sorted chunks, stretches of two lengths, blocks of the table, scans and windows of the ring.
SMALL = Config(SORT=32, CHUNK=16, WINDOW=32, SCAN=16, sort_warps=1, walk_warps=1, walk_registers=128)
OTHERS = [
    Config({**SMALL, "SORT": 64, "CHUNK": 64, "WINDOW": 16}),  # windows that an event range fills often
    Config({**SMALL, "SORT": 128, "SCAN": 64, "WINDOW": 16}),  # more is scanned at once than a window takes
    Config({**SMALL, "SORT": 4, "CHUNK": 32, "WINDOW": 128}),  # three rounds of merging
]


def make_scores(kind: str, n: int, rows: int = 1) -> torch.Tensor:
    noise = torch.randn((1, rows, n), generator=torch.Generator().manual_seed(n))
    return SCORES[kind](noise, torch.arange(n).float()).expand(1, rows, n).contiguous()


@pytest.fixture
def short_stretches(monkeypatch):
    monkeypatch.setattr(threshold, "FINE", 4)


@pytest.fixture
def filtering(monkeypatch):
    """Rows from 32 keys on leave keys out, in several blocks."""
    monkeypatch.setattr(threshold, "FILTERED", 32)
    monkeypatch.setattr(threshold, "MANY", 3)
    monkeypatch.setattr(threshold, "BLOCK", 16)
    monkeypatch.setattr(threshold, "BACK", 8)
    monkeypatch.setattr(threshold, "BOUNDED", 4)
    monkeypatch.setattr(threshold, "RECENT", 4)


def check_selection(kind, n, k, w, rows, config):
    u = make_scores(kind, n, rows)
    got, expected = launch.threshold(u, k, w, config), reference.select(u.double(), k, w)
    assert torch.equal(got.expiry, expected.expiry)
    expected = reference.select(u.double().clamp(-LIMIT, LIMIT), k, w)
    torch.testing.assert_close(got.tau.double(), expected.tau, rtol=1e-6, atol=1e-6)
    for name in ("sat_end", "sup_end", "interior"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("n", "k", "w", "rows"), [(110, 9, 7, 2), (100, 60, 0, 1)])
def test_selection(kind, n, k, w, rows, short_stretches):
    assert not threshold.filtered(n - w, k)
    check_selection(kind, n, k, w, rows, SMALL)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("n", "k", "w", "rows", "config"), [(150, 5, 7, 2, 0), (97, 16, 0, 1, 1), (128, 1, 33, 1, 2)])
def test_selection_of_filtered_rows(kind, n, k, w, rows, config, short_stretches, filtering):
    assert threshold.filtered(n - w, k)
    check_selection(kind, n, k, w, rows, (SMALL, *OTHERS)[config])


def left(u: torch.Tensor, k: int) -> list[int]:
    """How many keys of each row the filter leaves."""
    with mock.patch.object(launch, "_threshold", wraps=launch._threshold) as solve:
        launch.threshold(u, k, 0, SMALL)
    return solve.call_args.args[1][: u.shape[0] * u.shape[1]].tolist()


@pytest.mark.parametrize("kind", SCORES)
def test_the_filter_leaves_out_most_and_nothing_that_counts(kind, filtering):
    k, n = 4, 200
    u = make_scores(kind, n, 2)
    counts = left(u, k)
    expected = reference.select(u.double().clamp(-LIMIT, LIMIT), k, 0)
    at = torch.arange(n)
    matter = ((expected.sup_end > at) | (expected.expiry > at)).sum(-1).flatten().tolist()
    assert all(count >= some for count, some in zip(counts, matter, strict=True))
    if kind in ("random", "falling", "minus infinity"):
        assert max(counts) < n // 2
    if kind in ("rising", "steep"):
        assert min(counts) == n


@pytest.mark.parametrize("kind", ["random", "slope", "ties", "falling"])
def test_bounds_are_below_tau_and_close(kind):
    """F there is at least k, by definition, but not by much: 8 rows, so that 2 % would show."""
    k, n, rows, stride = 48, 700, 8, 60
    u = make_scores("random", n, rows) if kind == "random" else make_scores(kind, n).repeat(1, rows, 1)
    u = u + torch.linspace(0, 0.3, rows)[:, None]
    u, bounds, parts = u[0].contiguous(), threshold.bounds(n, k), filter_t.PARTS.value
    recent = (n - 1) // stride - filter_t.LATELY.value + 1
    lowest = torch.full((rows, bounds * parts + recent), float("nan"))
    filter_t.bounds_kernel[(bounds * parts + recent, rows)](u, lowest, n, k, bounds, stride, BLOCK=64, num_warps=1)
    edges = [[(2 * k << a) * part // parts for part in range(parts + 1)] for a in range(bounds)]
    ranges = [pair for of_a_prefix in edges for pair in itertools.pairwise(of_a_prefix)]
    goals = [k / parts] * len(ranges) + [k] * recent
    ranges += [(i * stride, (i + filter_t.LATELY.value) * stride) for i in range(recent)]
    mass = torch.stack(
        [(u[:, first:end].double() - lowest[:, [i]]).clamp(0, 1).sum(-1) for i, (first, end) in enumerate(ranges)]
    )
    goal = torch.tensor(goals)[:, None]
    assert (mass >= goal).all()
    assert ((mass < 1.15 * goal + 1) | (kind == "ties")).all()


def test_the_filter_follows_a_trend(filtering, monkeypatch):
    """Prefixes alone bound little where later keys are better."""
    k, n = 16, 512
    u = make_scores("random", n, 2) + 0.04 * torch.arange(n)
    counts = left(u, k)
    monkeypatch.setattr(threshold, "RECENT", n)
    assert all(count < 0.7 * alone for count, alone in zip(counts, left(u, k), strict=True))


@pytest.mark.parametrize("k", [1, 93, 94, 95, 200])
def test_budgets_around_the_number_of_candidates(k):
    u = make_scores("random", 100)
    got, expected = launch.threshold(u, k, 6, SMALL), reference.select(u.double(), k, 6)
    torch.testing.assert_close(got.tau.double(), expected.tau, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(got[1:], expected[1:], strict=True))


@pytest.mark.parametrize("kind", ["random", "ties", "rising", "all dropped at once"])
@pytest.mark.parametrize("parts", [0, 2, 8])  # of every stretch; 0: as long rows have them
@pytest.mark.parametrize("k", [9, 40])  # filtered and not
def test_results_do_not_depend_on_the_config(kind, parts, k, short_stretches, filtering, monkeypatch):
    if parts:
        monkeypatch.setattr(threshold, "PROGRAMS", 6)  # several launches of the walk
        monkeypatch.setattr(threshold, "SKIPPED", 1)
        monkeypatch.setattr(threshold, "PARTS", parts)
        monkeypatch.setattr(threshold, "TIMES", 4)  # the events' programs find several one after the other
        monkeypatch.setattr(threshold, "PIECE", 4)  # of which they sort several
    u = make_scores(kind, 90)
    results = [launch.threshold(u, k, 5, config) for config in (SMALL, *OTHERS)]
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("m", [2, 3, 100, 8192, 1 << 20, 1 << 29])
@pytest.mark.parametrize("budget", [lambda m: 1, lambda m: m // 100 + 1, lambda m: m // 2, lambda m: m - 1])
@pytest.mark.parametrize("chunk", [64, 1024])
def test_cuts_cover_the_row_and_stay_bounded(m, budget, chunk):
    k = budget(m)
    c = threshold.cuts(m, k, chunk)
    assert c.few * c.fine + (c.stretches - c.few) * c.chunk >= m - k
    assert c.fine * max(0, c.few - 1) + c.chunk * max(0, c.stretches - c.few - 1) < m - k  # none is empty
    assert (c.blocks - 1) * c.span < 2 * m <= c.blocks * c.span
    assert 2 * k << max(0, threshold.bounds(m, k) - 1) < max(m, 2 * k + 1) and 2 * k << threshold.bounds(m, k) >= m
    assert c.blocks <= 512 and c.stretches <= 4096 + 512


@pytest.mark.parametrize("kind", ["random", "ties", "rising", "falling"])
@pytest.mark.parametrize(("n", "k", "w", "block"), [(130, 12, 7, 16), (100, 40, 0, 64), (50, 60, 3, 8)])
def test_schedule_lays_out_every_part(kind, n, k, w, block, monkeypatch):
    monkeypatch.setattr(schedule, "FANOUT", 2)
    monkeypatch.setattr(schedule, "STRIDE", 8)
    monkeypatch.setattr(schedule, "READ", 16)
    scores = make_scores(kind, n)
    selection = reference.select(scores, k, w)
    size, expiry, sat_end = 16, selection.expiry.flatten(), selection.sat_end.flatten()
    lists = launch.schedule(scores, selection, k, w, Config(SEGMENT=size, BLOCK=block, num_warps=1, registers=64))
    j = torch.arange(n)
    for segment, begin in enumerate(range(0, n, size)):
        end = min(begin + size, n)
        before = (j + w < begin) & (expiry > begin)
        dropped = j[before & (expiry < end)]
        stays, whole = before & (expiry >= end), sat_end >= end
        born = j[(j + w >= begin) & (j + w < end) & (expiry > j + w)]
        outlives, late = born[expiry[born] >= end], born[expiry[born] < end]
        parts = [dropped[expiry[dropped].argsort()], j[stays & ~whole], j[stays & whole], outlives, late]
        ends = torch.tensor([len(p) for p in parts]).cumsum(0)
        assert lists.bounds[0, segment].tolist() == ends.tolist()
        listed = torch.cat(parts)
        assert lists.keys[0, segment, : ends[4]].tolist() == listed.tolist()
        for beside, values in ((lists.scores, scores), (lists.expiry, expiry), (lists.sat_end, sat_end)):
            assert torch.equal(beside[0, segment, : ends[4]], values.flatten()[listed])
        query = torch.arange(begin, end)[:, None]
        assert lists.start[0, begin:end].tolist() == (expiry[dropped] <= query).sum(1).tolist()
        assert lists.stop[0, begin:end].tolist() == (ends[2] + (outlives + w <= query).sum(1)).tolist()
        assert lists.late_stop[0, begin:end].tolist() == (ends[3] + (late + w <= query).sum(1)).tolist()
