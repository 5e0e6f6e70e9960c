"""The strong peer computes SparseK without gates, and its block mask is exactly that of its mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from sparsek_tune import reference
from sparsek_tune.bench import flex, inputs
from sparsek_tune.bench.cases import Case, attended
from sparsek_tune.presets import Shape


def make(n=200, w=0, k=24, b=1, scores="iid"):
    return inputs.make(Case(Shape(hq=4, hkv=2, d=16, n=n, k=k, w=w, dtype="fp32", gate="none", b=b), scores), 0, "cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("n", "w", "k", "b"), [(200, 0, 24, 1), (200, 16, 24, 2), (129, 200, 5, 1), (130, 3, 400, 1)])
def test_eager_output_is_that_of_the_reference(n, w, k, b):
    i = make(n, w, k, b)
    attend, tensors, dout = flex.prepare(i, compile=False)
    want = reference.sparsek_attention(*i[:4], i.k, window=i.window, gate="none")
    assert torch.allclose(attend(*tensors).reshape(want.shape), want, atol=1e-5)
    assert torch.equal(dout.reshape(want.shape), i.dout)


@pytest.mark.parametrize(("scores", "by"), [("iid", "expiry"), ("slope", "position")])
@pytest.mark.parametrize(("n", "w", "k"), [(512, 0, 64), (512, 100, 40), (500, 30, 64), (640, 0, 600), (130, 200, 9)])
def test_blocks_are_those_that_torch_finds_with_the_whole_mask(n, w, k, scores, by):
    p = flex.permute(make(n, w, k, b=2, scores=scores), by)
    got = flex.block_mask(p.born, p.expiry, 128)
    rows = len(p.born)
    want = create_block_mask(flex.seen(p.born, p.expiry), rows, 1, n, n, device="cpu", BLOCK_SIZE=128)
    assert got.seq_lengths == want.seq_lengths and got.shape == want.shape
    assert torch.equal(got.to_dense(), want.to_dense())
    for name in ("kv", "q"):
        for count, index in (
            (f"{name}_num_blocks", f"{name}_indices"),
            (f"full_{name}_num_blocks", f"full_{name}_indices"),
        ):
            a, b = (_sets(getattr(m, count), getattr(m, index)) for m in (got, want))
            if n % 128 == 0 or not count.startswith("full"):
                assert a == b, count


def _sets(count, index):
    """The listed blocks of every row of blocks."""
    return [set(i[:c].tolist()) for c, i in zip(count.flatten(), index.flatten(0, -2), strict=True)]


@pytest.mark.parametrize(("scores", "least"), [("iid", 0.4), ("slope", 0.3)])
def test_the_order_makes_it_a_strong_peer(scores, least):
    """Of the pairs in the blocks that it computes, the part that the mask keeps; and the better of two orders."""
    i = make(2048, 0, 256, scores=scores)
    p, mask = flex.arrange(i)
    useful = len(p.born) * attended(2048, 256, 0) / (flex.count(mask) * 128 * 128)
    assert useful > least and mask.full_kv_num_blocks.sum() > 0
    both = [flex.permute(i, by) for by in ("expiry", "position")]
    assert flex.count(mask) == min(flex.count(flex.block_mask(q.born, q.expiry)) for q in both)


def test_rising_scores_keep_their_order():
    """The keys in order of position are in order of expiry too; nothing is lost by that."""
    i = make(1024, 0, 128)
    i = i._replace(scores=torch.arange(1024.0).expand(1, 2, -1))
    assert torch.equal(flex.permute(i, "expiry").born, flex.permute(i, "position").born)
