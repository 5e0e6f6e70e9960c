"""The whole run on the CPU: what the document holds, and that a failure costs nothing but itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from sparsek_tune.bench import check, inputs, ours, peers, run
from sparsek_tune.bench.cases import STAGES, Case, forward_flops
from sparsek_tune.presets import Shape
from sparsek_tune.tune.stages import Inputs

SHAPES = [Shape(hq=4, hkv=2, d=16, n=n, k=16, w=w, dtype="fp32") for n, w in ((96, 0), (130, 8))]
CASES = [Case(s, name) for s in SHAPES for name in ("iid", "slope")]


def _attend(i: Inputs):
    return lambda q, k, v: q * k.sum() + v.sum(), (i.query, i.key, i.value), i.dout


def _raise(error):
    def attend(i):
        raise error

    return attend


GOOD = peers.Peer("good", "adds things up", _attend)
BROKEN = peers.Peer("broken", "", _raise(RuntimeError("a long story\nwith details")))
HUNGRY = peers.Peer("hungry", "", _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")))
PICKY = peers.Peer("picky", "", _raise(peers.Unfit("not on a Tuesday")))
ABSENT = peers.Peer("absent", "", _attend, ("no_such_package", "no-such-package"))


def go(machine, device, which=(), cases=CASES, **settings):
    notes, saved = [], []
    bench = run.Bench(
        machine, device, run.Settings(seconds=0.01, **settings), notes.append,
        lambda document: saved.append(json.loads(json.dumps(document))),
    )  # fmt: skip
    document = bench.run(cases, list(which), "sparsek-tune bench")
    return document, notes, saved


def test_the_document(cpu, device):
    document, _, saved = go(cpu, device, [GOOD, ABSENT])
    assert document["schema"] == 2 and document["device"]["name"] == device.name
    assert {"command", "date", "versions", "protocol"} <= document.keys()
    assert document["protocol"]["seed"] == 0 and document["versions"]["torch"] == torch.__version__
    assert document["missing"] == {"absent": "the package no-such-package is not installed"}
    assert document["peers"]["good"]["note"] == "adds things up"
    assert len(document["cases"]) == len(CASES) == len(saved) / 2
    for case, c in zip(CASES, document["cases"], strict=True):
        assert c["problem"] == vars(case.shape) and c["distribution"] == case.distribution and "error" not in c
        assert list(c["stages"]) == list(STAGES) and set(c["totals"]) == {
            "forward",
            "forward_graph",
            "forward_backward",
        }
        for time in (*c["stages"].values(), *c["totals"].values(), c["index"], c["sort"], *c["host_us"].values()):
            assert 0 < time["low"] <= time["median"] <= time["high"] and time["samples"] >= 3
        assert set(c["host_us"]) == {"forward", "forward_after_idle", "forward_with_grad"}
        assert set(c["memory"]) == {"forward", "forward_backward"}
        assert c["index_bytes_per_token"] == 2 * 5 * 4  # five tensors of 4 bytes, two KV heads
        assert {r["grade"] for r in c["configs"].values()} == {"default"}
        assert c["check"]["reduced"]["passed"] and c["check"]["sampled"]["passed"]
        good, ratio = c["peers"]["good"], c["peers"]["good"]["ratio"]
        for name in ("forward", "forward_backward"):
            assert ratio[name] == good[name]["median"] / c["totals"][name]["median"]


def test_rates_and_shares(cpu, device):
    (c,) = go(cpu, device, cases=CASES[:1])[0]["cases"]
    flops, ms = forward_flops(SHAPES[0]), {**c["stages"], **c["totals"]}
    ms["forward_total"], ms["forward"] = c["totals"]["forward"], c["stages"]["forward"]
    rate = c["tflops"]
    assert rate["kernel_forward"] == pytest.approx(flops / (ms["forward"]["median"] * 1e-3) / 1e12)
    assert rate["forward"] == pytest.approx(flops / (ms["forward_total"]["median"] * 1e-3) / 1e12)
    together = (ms["dq"]["median"] + ms["dkv"]["median"]) * 1e-3
    assert rate["kernel_backward"] == pytest.approx(2.5 * flops / together / 1e12)
    assert rate["forward_backward"] == pytest.approx(3.5 * flops / (ms["forward_backward"]["median"] * 1e-3) / 1e12)
    assert c["index_share"] == pytest.approx(c["index"]["median"] / ms["forward_total"]["median"])


def test_no_backward(cpu, device, monkeypatch):
    monkeypatch.setattr(check, "at_reduced_length", lambda *args: check.Verdict({}, None, 1.0))
    monkeypatch.setattr(ours, "forward_backward", None)  # is not touched
    document, _, _ = go(cpu, device, [GOOD], backward=False)
    for c in document["cases"]:
        assert list(c["stages"]) == list(STAGES[:3]) and "forward_backward" not in {*c["totals"], *c["tflops"]}
        assert "forward_backward" not in c["peers"]["good"] and "error" not in c


def test_peers_that_fail_are_reported_and_cost_nothing_else(cpu, device):
    document, notes, _ = go(cpu, device, [BROKEN, HUNGRY, PICKY, GOOD])
    for c in document["cases"]:
        found = c["peers"]
        assert found["broken"]["failed"] == "RuntimeError: a long story"
        assert found["hungry"]["failed"].startswith("OutOfMemoryError: CUDA out of memory")
        assert found["picky"]["skipped"] == "not on a Tuesday"
        assert found["good"]["forward"] and "error" not in c
    assert "  broken: RuntimeError: a long story" in notes


def test_a_peer_whose_backward_fails_keeps_its_forward(cpu, device):
    def attend(i):
        return lambda q, k, v: q.detach() * 2, (i.query, i.key, i.value), i.dout

    (c,) = go(cpu, device, [peers.Peer("half", "", attend)], cases=CASES[:1])[0]["cases"]
    row = c["peers"]["half"]
    assert row["forward"] and "forward_backward" not in row and row["failed"].startswith("RuntimeError")
    assert set(row["ratio"]) == {"forward"}


def test_slow_peers_are_skipped_and_quadratic_ones_tried_short_first(cpu, device, monkeypatch):
    lengths = []

    def attend(i):
        lengths.append(i.query.shape[2])
        return _attend(i)

    shape = Shape(hq=1, hkv=1, d=16, n=8192, k=4, w=0, dtype="fp32")
    monkeypatch.setattr(run.Bench, "_ours", lambda *args: None)
    monkeypatch.setattr(cpu, "once", lambda f: 0.1)
    peer = peers.Peer("dense", "", attend, quadratic=True)
    document, _, _ = go(cpu, device, [peer], cases=[Case(shape, "iid")])
    assert lengths == [1024] and "about 6.4 s" in document["cases"][0]["peers"]["dense"]["skipped"]
    document, _, _ = go(cpu, device, [peer], cases=[Case(shape, "iid")], peer_limit=7.0)
    assert lengths == [1024, 1024, 8192] and document["cases"][0]["peers"]["dense"]["forward"]


def test_one_timing_serves_all_distributions_where_scores_do_not_matter(cpu, device):
    made = []

    def attend(i):
        made.append(1)
        return _attend(i)

    which = [peers.Peer("scored", "", attend), peers.Peer("unscored", "", attend, scored=False)]
    document, _, _ = go(cpu, device, which)
    assert len(made) == len(CASES) + len(CASES) // 2
    first, second = (c["peers"]["unscored"] for c in document["cases"][:2])
    assert first["forward"] == second["forward"] and second["measured_with"] == str(CASES[0])
    assert (
        second["ratio"]["forward"] == first["forward"]["median"] / document["cases"][1]["totals"]["forward"]["median"]
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_peer_that_should_compute_the_same_is_checked(cpu, device):
    def eager(i):
        from sparsek_tune.bench import flex

        return flex.prepare(i, compile=False)

    def wrong(i):
        attend, *rest = eager(i)
        return lambda *args: attend(*args) * 1.001, *rest

    which = [peers.Peer("right", "", eager, exact=True), peers.Peer("wrong", "", wrong, exact=True)]
    (c,) = go(cpu, device, which, cases=CASES[-1:], backward=False)[0]["cases"]
    assert c["peers"]["right"]["error"] < 1e-5 and c["peers"]["right"]["forward"]
    assert "its result is wrong: relative error 1.00e-03" in c["peers"]["wrong"]["failed"]
    assert "forward" not in c["peers"]["wrong"]


def test_a_wrong_result_is_not_timed(cpu, device, monkeypatch):
    right = ours.results
    monkeypatch.setattr(ours, "results", lambda i: right(i)._replace(out=right(i).out + (i.scores.shape[-1] == 96)))
    document, _, _ = go(cpu, device, [GOOD])
    bad, good = document["cases"][0], document["cases"][2]
    assert bad["failed_check"] and "timed length: out: relative error" in bad["error"] and "stages" not in bad
    assert "error" not in good and bad["peers"]["good"]["ratio"] == {}


def test_a_case_that_runs_out_of_memory_costs_itself_alone(cpu, device, monkeypatch):
    right = inputs.make

    def make(case, *args):
        if case.shape.n == 96:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(case, *args)

    monkeypatch.setattr(inputs, "make", make)
    document, notes, _ = go(cpu, device, [GOOD])
    assert ["error" in c for c in document["cases"]] == [True, True, False, False]
    assert not document["cases"][0]["failed_check"] and any("OutOfMemoryError" in n for n in notes)
    assert "failed" in document["cases"][0]["peers"]["good"] and document["cases"][2]["peers"]["good"]["forward"]


def test_no_graph_is_no_failure(cpu, device, monkeypatch):
    def graph(f):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cpu, "graph", graph)
    (c,) = go(cpu, device, cases=CASES[:1])[0]["cases"]
    assert "not permitted" in c["graph_failed"] and "error" not in c and "forward_graph" not in c["totals"]


def test_a_lost_gpu_ends_the_peers_and_keeps_what_was_measured(cpu, device):
    def attend(i):
        cpu.answers = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    document, notes, _ = go(cpu, device, [GOOD, peers.Peer("vandal", "", attend), PICKY])
    first, last = document["cases"][0]["peers"], document["cases"][-1]["peers"]
    assert first["good"]["forward"] and "illegal memory" in first["vandal"]["failed"]
    assert "answers no more since vandal failed" in first["picky"]["failed"]
    assert all("answers no more" in row["failed"] for row in last.values())
    assert all("error" not in c for c in document["cases"])  # our own were there before
    assert sum("answers no more" in n for n in notes) >= 1


def test_every_step_is_saved(cpu, device):
    _, _, saved = go(cpu, device, [GOOD], cases=CASES[:2])
    assert [len(s["cases"]) for s in saved] == [1, 2, 2, 2]
    assert [sum(bool(c["peers"]) for c in s["cases"]) for s in saved] == [0, 0, 1, 2]
    done = copy.deepcopy(saved[0]["cases"][0])
    assert done == {**saved[-1]["cases"][0], "peers": {}}
