"""Feasibility from compiled kernels, and the pool that compiles without a GPU."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import faults
import pytest
import torch

from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Problem, target_device
from sparsek_tune.tune.compile import kernels_of, later, use_target
from sparsek_tune.tune.cubin import MOST_STACK, infeasible, resources
from sparsek_tune.tune.forkserver import ForkServer
from sparsek_tune.tune.pool import CompilePool, default_jobs, settled
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.stages import KernelStage
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


def test_compilers_see_no_gpu_and_interpret_nothing(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with closing(ForkServer(faults.FACTORY)) as server:
        for how in (None, server):
            with CompilePool(faults.FACTORY, jobs=1, server=how) as pool:
                reason = pool.submit(SPEC, Config(tile=16, fault="sees")).result().reason
                assert "CUDA '' Triton 0" in reason, how


@pytest.mark.parametrize("cpus, gib, pools, jobs", [
    (8, 100, 1, 8), (8, 100, 2, 4), (40, 100, 1, 16), (40, 100, 2, 16), (8, 3, 1, 3), (8, 3, 2, 1), (1, 0, 3, 1),
])  # fmt: skip
def test_there_are_as_many_compilers_as_cpus_and_memory_allow(monkeypatch, cpus, gib, pools, jobs):
    real = {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": gib << 18}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setattr(os, "sysconf", real.__getitem__)
    assert default_jobs(pools) == jobs


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
    (found,) = (resources_of() for resources_of in kernels_of([kernel]).values())
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


def test_the_parts_of_a_candidate_are_compiled_apart_and_all_must_do():
    with CompilePool(faults.FACTORY, jobs=2) as pool:
        for fault in ("compile error of cases", "compile error of length"):
            parts = [pool.submit(SPEC, Config(tile=16, fault=fault), part) for part in ("length", "cases")]
            assert [p.result().status == "ok" for p in parts] == ["cases" in fault, "length" in fault]
            assert settled(parts).status == "compile" and "no such instruction" in settled(parts).reason
        spills = pool.submit(SPEC, Config(tile=16, fault="spills")).result()
        assert spills.status == "infeasible" and spills.seconds > 0
        assert pool.submit(SPEC, Config(tile=16, fault="spills"), "cases").result().status == "ok"  # not to be timed


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Lines of ``faults.log``."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("FAULTS_LOG", str(path))
    return lambda: path.read_text().splitlines()


def test_a_kernel_that_candidates_share_is_compiled_once_and_by_any_process(log):
    """Four candidates of three kernels, two of which all of them have."""
    with CompilePool(faults.FACTORY, jobs=2) as pool:
        futures = [pool.submit(SPEC, Config(tile=tile, fault="slow kernels")) for tile in (16, 32, 64, 128)]
        assert pool.submit(SPEC, Config(tile=16, fault="slow kernels")) is futures[0]
        found = [f.result() for f in futures]
    assert [f.status for f in found] == ["ok"] * 4 and all(0.5 <= f.seconds < 1.4 for f in found)  # of one kernel
    lines = [line.split() for line in log() if line.startswith("kernel ")]
    assert sorted(key for _, key, _ in lines) == ["all", "every", "of-128", "of-16", "of-32", "of-64"]
    assert len({pid for _, _, pid in lines}) == 2


def test_a_kernel_that_does_not_compile_fails_all_that_have_it_and_is_not_tried_again(log):
    with CompilePool(faults.FACTORY, jobs=2, timeout=1.0) as pool:
        found = [pool.submit(SPEC, Config(tile=tile, fault="a kernel hangs")).result() for tile in (16, 32)]
        good = pool.submit(SPEC, Config(tile=16, fault="none")).result()
    assert [f.status for f in found] == ["timeout", "timeout"] and good.status == "ok"
    assert sum(line.startswith("kernel all") for line in log()) == 1


def test_a_kernel_whose_process_was_killed_is_compiled_by_another(log):
    with CompilePool(faults.FACTORY, jobs=2) as pool:
        found = [pool.submit(SPEC, Config(tile=tile, fault="a kernel is killed once")).result() for tile in (16, 32)]
    assert [f.status for f in found] == ["ok", "ok"]
    lines = [line.split() for line in log() if line.startswith("kernel all")]
    assert len(lines) == 2 and lines[0] != lines[1]


def test_what_is_cancelled_is_not_compiled_but_what_others_need_of_it_is(log):
    with CompilePool(faults.FACTORY, jobs=1) as pool:
        first, second, third = (pool.submit(SPEC, Config(tile=t, fault="slow kernels")) for t in (16, 32, 64))
        while not any("kernel" in line for line in log()):
            time.sleep(0.01)
        assert first.cancel() and third.cancel()
        assert second.result().status == "ok"
        assert pool.submit(SPEC, Config(tile=16, fault="slow kernels")).result().status == "ok"  # asked for again
    keys = [line.split()[1] for line in log() if line.startswith("kernel ")]
    assert sorted(keys) == ["all", "every", "of-16", "of-32"] and keys[-1] == "of-16"


def test_a_candidate_is_done_before_those_that_were_submitted_later_are_looked_at(log):
    with CompilePool(faults.FACTORY, jobs=1) as pool:
        for future in [pool.submit(SPEC, Config(tile=tile, fault="kernels")) for tile in (16, 32, 64)]:
            assert future.result().status == "ok"
    done = [" ".join(line.split()[:2]) for line in log() if line.startswith(("list ", "kernel "))]
    first, *others = ("list of-16", "kernel every", "kernel all", "kernel of-16"), "of-32", "of-64"
    assert done == [*first, *(f"{what} {one}" for one in others for what in ("list", "kernel"))]


def kernels(log):
    return [line.split()[1] for line in log() if line.startswith("kernel ")]


def test_what_is_early_comes_after_all_else_until_somebody_asks_for_it(log, gate):
    def submit(tile, early=False):
        return pool.submit(SPEC, Config(tile=tile, fault="gated kernels"), early=early)

    with CompilePool(faults.FACTORY, jobs=1) as pool:
        first, *early = submit(16), submit(32, early=True), submit(64, early=True)
        wanted = submit(128)
        assert submit(64) is early[1] and submit(64, early=True) is early[1]
        gate.touch()
        assert all(f.result().status == "ok" for f in (first, *early, wanted))
    assert kernels(log) == ["every", "all", "of-16", "of-128", "of-64", "of-32"]


@pytest.mark.parametrize("again", [False, True])
def test_kernels_of_what_is_early_are_compiled_when_others_need_them_or_it_is_asked_for(again, log, gate):
    def submit(tile, early=False):
        return pool.submit(SPEC, Config(tile=tile, fault="gated kernels"), early=early)

    with CompilePool(faults.FACTORY, jobs=1) as pool:
        futures = [submit(16, early=True)]
        while not kernels(log):
            time.sleep(0.01)
        futures += [submit(tile) for tile in ((16, 32, 64) if again else (32, 64))]
        gate.touch()
        assert all(f.result().status == "ok" for f in futures)
    mine, others = ["of-16"], ["of-32", "of-64"]
    assert kernels(log) == ["every", "all", *(mine + others if again else others + mine)]


def test_a_pool_is_closed_whatever_was_cancelled_before():
    pool = CompilePool(faults.FACTORY, jobs=1)
    futures = [pool.submit(SPEC, Config(tile=tile, fault="slow kernels")) for tile in (16, 32, 64)]
    assert futures[1].cancel()
    pool.close()
    pool.close()
    assert all(future.cancelled() for future in futures)


@pytest.mark.compile90
@pytest.mark.parametrize("name", ["forward", "dq", "dkv"])
def test_small_problems_take_the_same_kernels_whatever_won_elsewhere(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    use_target(H100)
    problem = Problem.of("bf16", 64, 2, "kv", 64, 32, 4096, 2)
    defaults = {n: t.default(problem, H100) for n, t in TEMPLATES.items()}
    others = {n: next(c for c in t.feasible(problem, H100) if c != defaults[n]) for n, t in TEMPLATES.items()}
    others["schedule"] = Config({**others["schedule"], "SEGMENT": 1024})

    def keys(companions, part):
        spec = Spec(name, problem, H100, {**companions, name: defaults[name]})
        return KernelStage(spec, "compile").kernels(defaults[name], part).keys()

    assert keys(defaults, "cases") == keys(others, "cases")
    assert keys(defaults, "length") != keys(others, "length")


@pytest.mark.compile90
def test_kernels_that_are_put_off_are_listed_and_compiled_when_asked_for(tmp_path, monkeypatch):
    from compiled import product

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    use_target(H100)
    with later():
        one, again, other = (
            product.warmup(*[torch.float32] * 3, TILE=tile, grid=(1,), num_warps=1) for tile in (16, 16, 32)
        )
    first, second = found = kernels_of([one, again, other])
    assert not list(tmp_path.rglob("*.cubin"))
    assert found[first]().name == "product"
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    with later():
        now = product.warmup(*[torch.float32] * 3, TILE=16, grid=(1,), num_warps=1)
    assert list(kernels_of([now])) == [first]  # compiled or not
    assert found[second]() == kernels_of([other])[second]()
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


_KEYS = """
import sys
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.problem import Problem, target_device
from sparsek_tune.tune.compile import CompileService
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.stages import KernelStage
from sparsek_tune.tune.types import Spec

problem, device = Problem.of("bf16", 64, 2, "kv", 64, 32, 1024, 2), target_device("cuda:90")
service = CompileService(FACTORY)
defaults = {name: t.default(problem, device) for name, t in TEMPLATES.items()}
keys = {name: service.kernels(Spec(name, problem, device, defaults), defaults[name], "length") for name in sys.argv[1:]}
print({name: keys[name] for name in sorted(keys)})
"""


def test_processes_agree_on_the_keys_of_kernels_whichever_they_meet_first():
    """Or one would compile again what another has left in Triton's cache."""
    names = list(TEMPLATES)
    first, second = (
        subprocess.run([sys.executable, "-c", _KEYS, *order], capture_output=True, text=True, check=True).stdout
        for order in (names, names[::-1])
    )
    assert first == second and first.count("'") > 20


def test_what_is_submitted_after_the_end_is_cancelled():
    pool = CompilePool(faults.FACTORY, jobs=1)
    pool.close()
    assert pool.submit(SPEC, Config(tile=16, fault="none")).cancelled()


def test_the_end_wakes_who_waits_for_candidates():
    pool = CompilePool(faults.FACTORY, jobs=1)
    futures = [pool.submit(SPEC, Config(tile=t, fault="slow kernels")) for t in (16, 32)]
    threading.Timer(0.5, pool.close).start()
    assert concurrent.futures.wait(futures, timeout=20).not_done == set()
