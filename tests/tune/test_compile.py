"""Feasibility from compiled kernels, and the pool that compiles without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import faults
import pytest
import torch
from triton.runtime._async_compile import active_mode

from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Problem, target_device
from sparsek_tune.tune.compile import MOST_STACK, CompilePool, infeasible, kernels_of, side_by_side, use_target
from sparsek_tune.tune.cubin import resources
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.types import Kernel, Spec

H100 = target_device("cuda:90")
SPEC = Spec("fake", faults.PROBLEM, faults.DEVICE, {})


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (Kernel("k", 255, MOST_STACK, 232448, 8), None),
        (Kernel("k", 64, 0, 232449, 4), "shared memory of 232449 bytes, 232448 available"),
        (Kernel("k", 255, MOST_STACK + 8, 0, 4), "spills"),
        (Kernel("k", 255, 0, 0, 16), "65536 an SM"),
    ],
)
def test_bounds_are_stated_and_kept(kernel, words):
    reason = infeasible([Kernel("good", 32, 0, 0, 4), kernel], H100)
    assert reason is None if words is None else (words in reason and reason.startswith("k: "))


def test_candidates_compile_at_the_same_time_and_a_crash_takes_one():
    with CompilePool(faults.FACTORY, jobs=2, timeout=2.0) as pool:
        kinds = ("none", "compile crash", "compile hang", "none", "compile error", "none")
        start = time.monotonic()
        futures = [pool.submit(SPEC, Config(tile=16, fault=f)) for f in kinds]
        assert futures[3].result().status == "ok" and time.monotonic() - start < 10
        assert [f.result().status for f in futures] == ["ok", "compile", "timeout", "ok", "compile", "ok"]
        assert "SIGABRT" in futures[1].result().reason and "no such instruction" in futures[4].result().reason


def test_closing_does_not_wait_for_a_hang():
    pool = CompilePool(faults.FACTORY, jobs=1, timeout=600.0)
    futures = [pool.submit(SPEC, Config(tile=16, fault="compile hang")) for _ in range(3)]
    time.sleep(1.0)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5 and all(f.done() for f in futures)


@pytest.mark.parametrize("damage", [b"", b"no ELF", b"\x7fELF\x02" + bytes(58), b"\x7fELF\x02" + b"\xff" * 70])
def test_a_damaged_cubin_is_refused(damage):
    with pytest.raises(ValueError, match="cubin"):
        resources(damage)


@pytest.fixture
def cuobjdump():
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(tool) if tool.exists() else shutil.which("cuobjdump")
    return found or pytest.skip("no cuobjdump to compare with")


@pytest.mark.compile90
@pytest.mark.parametrize(("tile", "spills"), [(16, False), (64, True)])
def test_the_reader_agrees_with_cuobjdump(tmp_path, monkeypatch, cuobjdump, tile, spills):
    """A really cross-compiled kernel; the larger product unrolls into more than its registers hold."""
    from compiled import product

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    use_target(H100)
    kernel = product.warmup(*[torch.float32] * 3, TILE=tile, grid=(1,), num_warps=4, enable_fp_fusion=True)
    (found,) = kernels_of([kernel])
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    assert f"REG:{found.registers} STACK:{found.stack} " in usage.stdout
    assert found.registers >= 16 and (found.stack > 0) == spills and found.warps == 4


@pytest.mark.compile90
def test_the_pool_compiles_real_candidates_for_a_target_without_a_gpu(capfd):
    problem = Problem.of("bf16", 64, 2, "kv", 64, 32, 1024, 2)
    spec = Spec("forward", problem, H100, {n: t.default(problem, H100) for n, t in TEMPLATES.items()})
    with CompilePool(FACTORY, jobs=1) as pool:
        good = pool.submit(spec, spec.companions["forward"]).result()
        # The same kernels for a device with little shared memory: compiled, but not to be launched.
        bad = pool.submit(spec._replace(device=replace(H100, smem=1024)), spec.companions["forward"]).result()
    assert good.status == "ok" and [k.name for k in good.kernels] == ["forward_kernel"]
    assert good.kernels[0].registers > 32 and good.kernels[0].shared > 0
    assert bad.status == "infeasible" and bad.reason.startswith("forward_kernel: shared memory")
    assert capfd.readouterr().out == ""


def test_a_candidate_is_two_halves_and_both_must_do():
    with CompilePool(faults.FACTORY, jobs=2) as pool:
        for fault in ("compile error of small problems", "compile error at length"):
            config = Config(tile=16, fault=fault)
            assert pool.submit(SPEC, config).result().status == "compile"
            timed = pool.submit(SPEC, config, cases=False).result()
            assert timed.status == ("ok" if "small" in fault else "compile")
        spills = pool.submit(SPEC, Config(tile=16, fault="spills")).result()
    assert spills.status == "infeasible" and spills.seconds > 0


def test_threads_compile_what_one_would_and_errors_come_with_the_result():
    class Compiled:
        def __init__(self, key):
            if key == "bad":
                raise ValueError("no such instruction")
            self.key, self.thread = key, threading.get_ident()

    def compile(key):
        return active_mode.get().submit(key, lambda: Compiled(key), lambda kernel: None)

    with side_by_side():
        futures = [compile(key) for key in ("a", "b", "bad", "a")]
    assert [f.result().key for f in (futures[0], futures[1], futures[3])] == ["a", "b", "a"]
    assert futures[0].result().thread != threading.get_ident()
    with pytest.raises(ValueError, match="no such instruction"):
        futures[2].result()
    with side_by_side():  # an error leaves nothing behind
        pass
