"""Peers are asked for what they can do, with what they need; those with packages of their own are faked here."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from sparsek_tune.bench import inputs, peers
from sparsek_tune.bench.cases import PEERS, Case
from sparsek_tune.presets import Shape

SHAPE = Shape(hq=4, hkv=2, d=16, n=128, k=32, w=0, dtype="fp32")


def test_dense_runs_on_the_backend_that_is_named(monkeypatch):
    peer = peers.BY_NAME["flash"]
    assert peer.missing() is None and peer.version().startswith("torch ")
    i = inputs.make(Case(SHAPE, "iid"), 0, "cpu")
    made = peers.ready(peer, i)
    want = F.scaled_dot_product_attention(i.query, i.key, i.value, is_causal=True, enable_gqa=True)
    assert torch.allclose(made.forward(), want, atol=1e-5)
    assert [g.shape for g in made.both()] == [i.query.shape, i.key.shape, i.value.shape]
    with pytest.raises(RuntimeError):
        peers.ready(peers.BY_NAME["cudnn"], i).forward()  # the CPU has no cuDNN


def test_keys_share_timings_only_where_nothing_matters():
    iid, slope, trained = (Case(SHAPE, name) for name in ("iid", "slope", "trained"))
    dense, flex = peers.BY_NAME["cudnn"], peers.BY_NAME["flex"]
    assert dense.key(iid) == dense.key(slope) != dense.key(trained)
    assert dense.key(iid) == dense.key(Case(Shape(**{**vars(SHAPE), "k": 99, "w": 9, "gate": "v"}), "iid"))
    assert dense.key(iid) != dense.key(Case(Shape(**{**vars(SHAPE), "n": 256}), "iid"))
    assert flex.key(iid) != flex.key(slope)


@pytest.mark.parametrize(("name", "package"), [("nsa", "fla-core"), ("adasplash", "adasplash")])
def test_a_package_that_is_not_there_is_named(name, package, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    assert peers.BY_NAME[name].missing() == f"the package {package} is not installed"
    assert peers.BY_NAME["flex"].missing() is None


def test_a_package_without_metadata_is_of_unknown_version():
    assert peers.Peer("x", "", lambda i: None, ("json", "no-such-distribution")).version() == "unknown"


def fake(monkeypatch, name, **functions):
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


def test_adasplash_is_called_with_contiguous_heads_first(monkeypatch):
    calls = []
    fake(monkeypatch, "adasplash", adasplash_v2=lambda q, k, v: calls.append((q, k, v)) or q * 1)
    i = inputs.make(Case(SHAPE, "iid"), 0, "cpu")
    made = peers.ready(peers.BY_NAME["adasplash"], i)
    made.forward()
    assert [x.shape for x in calls[0]] == [i.query.shape, i.key.shape, i.key.shape]
    assert all(x.is_contiguous() for x in calls[0])
    odd = inputs.make(Case(Shape(hq=4, hkv=2, d=16, n=100, k=8, w=0), "iid"), 0, "cpu")
    with pytest.raises(peers.Unfit, match="power of two"):
        peers.ready(peers.BY_NAME["adasplash"], odd)
    long = inputs.make(Case(Shape(hq=1, hkv=1, d=16, n=65536, k=8, w=0), "iid"), 0, "cpu")
    with pytest.raises(peers.Unfit, match="minutes above 32768"):
        peers.ready(peers.BY_NAME["adasplash"], long)
    wide = inputs.make(Case(Shape(hq=4, hkv=2, d=80, n=128, k=8, w=0), "iid"), 0, "cpu")
    with pytest.raises(peers.Unfit, match="head size"):
        peers.ready(peers.BY_NAME["adasplash"], wide)


def test_nsa_gets_blocks_and_fewer_kv_heads(monkeypatch):
    calls = []

    def parallel_nsa(q, k, v, **options):
        calls.append((q, k, v, options))
        return q * 1

    fake(monkeypatch, "fla.ops.nsa", parallel_nsa=parallel_nsa)
    shape = Shape(hq=32, hkv=8, d=16, n=1000, k=192, w=64, dtype="fp32")
    i = inputs.make(Case(shape, "iid"), 0, "cpu")
    peers.ready(peers.BY_NAME["nsa"], i).forward()
    q, k, v, options = calls[0]
    assert q.shape == (1, 1000, 32, 16) and k.shape == v.shape == (1, 1000, 2, 16)
    assert options["block_indices"].shape == (1, 1000, 2, 4) and options["block_counts"] == 4  # (192 + 64) / 64
    assert options["block_size"] == 64 and options["scale"] == i.scale


@pytest.mark.parametrize(("hq", "hkv", "heads"), [(32, 8, 2), (64, 2, 2), (16, 16, 1), (32, 1, 1), (64, 8, 4)])
def test_nsa_kv_heads(hq, hkv, heads):
    assert peers.nsa_kv_heads(hq, hkv) == heads


@pytest.mark.parametrize(("hq", "hkv"), [(12, 12), (48, 8), (8, 1)])
def test_nsa_refuses_what_its_kernels_do_not_take(hq, hkv):
    heads = None
    try:
        heads = peers.nsa_kv_heads(hq, hkv)
    except peers.Unfit:
        return
    assert hq // heads >= 16 and (hq // heads) & (hq // heads - 1) == 0 and hq % heads == 0


def test_nsa_blocks_are_the_best_before_each_query_and_its_own():
    u = torch.randn(1, 2, 1000, generator=torch.Generator().manual_seed(0))
    got = peers.nsa_blocks(u, 3)
    assert got.shape == (1, 1000, 2, 4) and got.dtype == torch.int64
    best = F.pad(u, (0, 24), value=-torch.inf).view(1, 2, 16, 64).amax(-1)
    for head in range(2):
        for t in (0, 63, 64, 200, 999):
            own = t // 64
            before = best[0, head, :own].argsort(descending=True)[:2].tolist()
            assert [x for x in got[0, t, head].tolist() if x >= 0] == sorted([*before, own])
    assert (got[..., 3] == -1).all()


def test_every_peer_says_what_it_computes():
    assert tuple(peers.BY_NAME) == PEERS and all(p.note for p in peers.BY_NAME.values())
