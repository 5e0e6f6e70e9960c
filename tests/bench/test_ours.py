"""The real stages, in Triton's interpreter, as the benchmark calls them; sizes of index tensors."""

from __future__ import annotations

import pytest
import torch

from sparsek_tune import dispatch, reference
from sparsek_tune.bench import check, inputs, ours, run
from sparsek_tune.bench.cases import STAGES, Case
from sparsek_tune.presets import Shape

CASE = Case(Shape(hq=2, hkv=1, d=16, n=96, k=16, w=8, dtype="fp32"), "iid")


def test_index_bytes_count_shared_memory_once():
    a = torch.zeros(10, dtype=torch.int32)
    assert ours.index_bytes([a, a[2:], torch.zeros(3)]) == 40 + 12


def test_leaves_want_gradients_where_the_gate_gives_one():
    i = inputs.make(CASE, 0, "cpu")
    assert [t.requires_grad for t in ours.leaves(i)] == [True] * 4
    assert [t.requires_grad for t in ours.leaves(i._replace(gate="none"))] == [True] * 3 + [False]
    assert len(ours.forward_backward(i._replace(gate="none"))()) == 3
    assert not ours.forward(i)().requires_grad and ours.forward_with_grad(i)().requires_grad


@pytest.mark.interpret
def test_the_real_stages_run_and_agree(device):
    i = inputs.make(CASE, 0, "cpu")
    made = ours.stages(i, dispatch.resolve(CASE.shape.problem, device).configs)
    assert tuple(made.run) == STAGES
    results = {name: f() for name, f in made.run.items()}
    want = reference.sparsek_attention(*i[:4], i.k, window=i.window)
    assert torch.allclose(results["forward"]["out"], want, atol=1e-5)
    assert results["dq"]["dq"].shape == i.query.shape and results["dkv"]["dk"].shape == i.key.shape
    found, alone = made.find(), made.run["schedule"]()
    end = int(alone.bounds[0, 0, 4])
    assert torch.equal(found.bounds, alone.bounds) and torch.equal(found.keys[..., :end], alone.keys[..., :end])
    assert len(made.index) > 5 and ours.index_bytes(made.index) >= 5 * 96 * 4


@pytest.mark.interpret
def test_a_whole_run_with_the_real_kernels(device, monkeypatch):
    import fake_machine

    monkeypatch.setattr(check, "at_reduced_length", lambda *args: check.Verdict({}, None, 1.0))  # takes a minute
    cpu = fake_machine.Cpu()
    bench = run.Bench(cpu, device, run.Settings(seconds=0.01), print, lambda document: None)
    cpu.host = lambda f, in_a_row: cpu.time(f, 0)  # one call takes seconds here
    (c,) = bench.run([CASE], [], "")["cases"]
    assert "error" not in c and set(c["stages"]) == set(STAGES)
