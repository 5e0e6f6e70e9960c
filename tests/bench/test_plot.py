"""The picture comes from the document alone: a line for all that differs but the length, and it is a PNG."""

from __future__ import annotations

import sys

import pytest
from document import document, entry

from sparsek_tune.bench import plot

CASES = [
    *(entry(n, k, distribution=d, scale=x)
      for n, k in ((8192, 512), (4096, 512), (65536, 1024)) for d, x in (("iid", 1.0), ("slope", 1.2))),
    entry(65536, 512, 512),
]  # fmt: skip


def test_our_lines_are_sorted_and_told_apart():
    lines = plot.our_lines(CASES, "forward")
    assert set(lines) == {"SparseK w=0 iid", "SparseK w=0 slope", "SparseK w=512 iid"}
    assert lines["SparseK w=0 iid"] == [(4096, 2.5 / 16), (8192, 2.5 / 8), (65536, 2.5)]
    assert lines["SparseK w=0 slope"][-1] == (65536, pytest.approx(3.0))


def test_two_budgets_at_one_length_are_two_lines():
    assert set(plot.our_lines([entry(4096, 512), entry(4096, 1024)], "forward")) == {"SparseK k=512", "SparseK k=1024"}
    assert set(plot.our_lines([entry(4096, 512), entry(8192, 1024)], "forward")) == {"SparseK"}


def test_peer_lines_are_those_of_the_first_distribution():
    lines = plot.peer_lines(CASES, "forward_backward")
    assert lines == {"cudnn": [(4096, 30 / 16), (8192, 30 / 8), (65536, 30.0)]}


@pytest.mark.parametrize("cases", [CASES, [entry(4096)], []], ids=["many", "one", "none"])
def test_a_png_is_drawn(cases, tmp_path):
    path = tmp_path / "bench.png"
    failed = {"problem": entry(512)["problem"], "distribution": "iid", "error": "wrong", "peers": {}}
    plot.draw(document(*cases, failed), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


def test_without_the_backward_pass(tmp_path):
    half = entry(4096)
    del half["totals"]["forward_backward"], half["stages"]["dq"], half["stages"]["dkv"]
    plot.draw(document(half), tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_a_missing_matplotlib_is_named(monkeypatch):
    assert plot.available() is None
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'sparsek-tune[bench]'" in str(plot.available())
