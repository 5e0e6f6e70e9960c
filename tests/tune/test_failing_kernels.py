"""The kernels that tests/gpu lets loose, as far as they can be tried without a GPU."""

from __future__ import annotations

import failing_kernels
import pytest
import torch
from failing_kernels import FAR, PROBLEM, Stage, put, spin

from sparsek_tune import launch
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Problem, target_device
from sparsek_tune.tune import stages
from sparsek_tune.tune.compile import use_target
from sparsek_tune.tune.redzone import MemoryCorrupted
from sparsek_tune.tune.types import Spec


@pytest.fixture
def stage():
    stage = Stage(Spec("fake", PROBLEM, target_device("cuda:90"), {}), "cpu")
    stage.prepare()
    return stage


def config(fault):
    return Config(tile=32, fault=fault)


@pytest.mark.interpret
def test_a_right_kernel_is_right(stage):
    assert stage.verify(config("none")) is None
    stage.check()


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("fault", "words"), [("nan", "error nan"), ("a hundredth off", "error 5"), ("reads after the end", "error nan")]
)
def test_a_wrong_result_is_told(stage, fault, words):
    assert words in stage.verify(config(fault))
    stage.check()


@pytest.mark.interpret
@pytest.mark.parametrize("fault", ["writes after the end", "writes before the start"])
def test_a_kernel_that_writes_out_of_bounds_is_caught(stage, fault):
    with pytest.raises(MemoryCorrupted, match=f"^out: written {fault[7:].replace('the', 'its')}$"):
        stage.verify(config(fault))
    stage.check()


@pytest.mark.interpret
def test_a_kernel_that_writes_its_input_is_caught(stage):
    stage.verify(config("writes an input"))
    with pytest.raises(MemoryCorrupted, match=r": x$"):
        stage.check()


@pytest.mark.interpret
def test_a_real_stage_with_a_kernel_that_writes_out_of_bounds(monkeypatch):
    device = target_device("cuda:90")
    problem = Problem.of("fp32", 16, 1, "kv", 32, 16, 256, 1)
    spec = Spec("forward", problem, device, {n: t.default(problem, device) for n, t in TEMPLATES.items()})
    stage = stages.make(spec, "interpret")
    stage.prepare()
    assert stage.verify(spec.companions["forward"]) is None
    monkeypatch.setattr(launch, "forward", launch.forward)  # to be put back
    stage = failing_kernels.make_spoilt(spec, "interpret")
    stage.prepare()
    with pytest.raises(MemoryCorrupted, match=r"^out: written after its end$"):
        stage.verify(spec.companions["forward"])


@pytest.mark.compile90
def test_what_only_a_gpu_can_survive_compiles():
    use_target(target_device("cuda:90"))
    options = {"grid": (1,), "num_warps": 4}
    loop = spin.warmup(torch.float32, **options).asm["ptx"]
    assert "ld.volatile" in loop and loop.count("bra") >= 1
    assert "st.global" in put.warmup(torch.float32, FAR, 1.0, **options).asm["ptx"]
