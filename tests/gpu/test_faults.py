"""What kernels can do to a GPU, done by kernels: each costs its candidate alone, and the right one wins.

Every kernel that fails runs in a worker process, so this process keeps its CUDA context. A minute or two in all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from triton import knobs

sys.path.append(str(Path(__file__).parents[1] / "tune"))  # for the workers too

from sparsek_tune.db.store import Store
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Problem, current_device
from sparsek_tune.tune import EFFORTS, types
from sparsek_tune.tune.bench import Bench
from sparsek_tune.tune.channel import CallFailed
from sparsek_tune.tune.pool import CompilePool
from sparsek_tune.tune.stage import FACTORY
from sparsek_tune.tune.tuner import tune
from sparsek_tune.tune.types import Part, Spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KERNELS, SPOILT = "failing_kernels:make", "failing_kernels:make_spoilt"
PROBLEM = Problem.of("bf16", 64, 4, "kv", 64, 32, 1024, 8)
EXPECTED = {  # fault: status, words of the reason
    "nan": ("wrong", "relative error nan"),
    "a hundredth off": ("wrong", "relative error 5"),
    "reads after the end": ("wrong", "relative error nan"),
    "writes after the end": ("wrong", "MemoryCorrupted: out: written after its end"),
    "writes before the start": ("wrong", "MemoryCorrupted: out: written before its start"),
    "writes an input": ("wrong", "MemoryCorrupted: written though only read, or beside it: x"),
    "illegal address": ("runtime", "illegal memory access"),
    "out of memory": ("runtime", "out of memory"),
    "hang": ("timeout", "ran past its wall time"),
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(EFFORTS, "tiny", types.Effort(60, 300.0, 0.02, 2, 0.05, 4, 2, timeout=8.0))


def template(*names):
    import faults

    return faults.template(
        tiles=(32, 64), faults=("none", *names),
        check=lambda config, problem, device: None if config["tile"] == 32 or config["fault"] == "none" else "enough",
    )  # fmt: skip


def test_every_fault_costs_its_candidate_alone_and_the_faster_config_wins(tiny, tmp_path):
    t = template(*EXPECTED)
    with Store(tmp_path / "cache.db") as store:
        options = {"effort": "tiny", "templates": {t.name: t}, "factory": KERNELS}
        (row,) = tune([PROBLEM], current_device(), store, **options)
        found = {r.config: r.result for r in store.measurements(current_device(), t, PROBLEM)}
    for fault, (status, words) in EXPECTED.items():
        result = found[Config(tile=32, fault=fault)]
        assert (result.status, words in result.reason) == (status, True), (fault, result.status, result.reason)
    assert found[Config(tile=32, fault="none")].status == found[Config(tile=64, fault="none")].status == "ok"
    assert row.config == Config(tile=64, fault="none") and row.speedup > 1.2
    assert float(torch.ones(1000, device="cuda").sum()) == 1000.0, "this process's context is alive"


def test_a_killed_run_leaves_nothing_on_the_gpu(tmp_path):
    """Not even a kernel that never ends."""
    log = tmp_path / "log"
    code = """
import faults, sys
from sparsek_tune.problem import current_device
from sparsek_tune.tune.bench import Bench
from sparsek_tune.tune.types import Part, Spec
from sparsek_tune.kernel_templates.base import Config
import failing_kernels as f
Bench(f.FACTORY, timeout=300.0).verify(Spec("fake", f.PROBLEM, current_device(), {}), Config(tile=32, fault="hang"))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "FAULTS_LOG": str(log)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    end = time.monotonic() + 60
    while not (log.exists() and "hang" in log.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    (worker,) = [int(line.split()[-1]) for line in log.read_text().splitlines() if line.startswith("measure")]
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30  # the driver takes the context down, kernel and all
    while running(worker):
        assert time.monotonic() < end
        time.sleep(0.1)
    with Bench(KERNELS, timeout=30.0) as bench:
        assert bench.verify(Spec("fake", PROBLEM, current_device(), {}), Config(tile=32, fault="none")) is None


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def specs():
    """Of every template, at a problem with several segments, a window and keys that are left out; all compiled."""
    device, problem = current_device(), Problem.of("bf16", 64, 4, "kv", 512, 128, 4096, 2)
    defaults = {n: t.default(problem, device) for n, t in TEMPLATES.items()}
    found = {name: Spec(name, problem, device, defaults) for name in TEMPLATES}
    with CompilePool(FACTORY, timeout=300.0) as pool:
        compiled = [pool.submit(found[name], defaults[name], part) for name in found for part in get_args(Part)]
        assert {c.result().status for c in compiled} == {"ok"}
    return found


def cubins():
    return set(Path(knobs.cache.dir).rglob("*.cubin"))


def test_what_the_pool_compiles_is_all_that_the_measuring_process_runs(specs):
    before = cubins()
    with Bench(FACTORY, timeout=120.0) as bench:
        for name, spec in specs.items():
            assert bench.verify(spec, spec.companions[name]) is None
            assert bench.measure(spec, spec.companions[name], 0.02, float("inf")).median > 0
            assert cubins() == before, name
        for name, spec in specs.items():  # beside the stage that is set up
            assert bench.verify_cases(spec, spec.companions[name]) is None
            assert cubins() == before, name


def test_the_real_kernels_write_nothing_but_their_own(specs):
    """Neither beyond their buffers nor into what they read: by redzones and fingerprints, at both lengths."""
    with Bench(FACTORY, timeout=120.0) as bench:
        for name, spec in specs.items():
            assert bench.verify(spec, spec.companions[name]) is None, name


def test_a_real_stage_that_writes_out_of_bounds_is_caught(specs):
    spec = specs["forward"]
    with Bench(SPOILT, timeout=120.0) as bench, pytest.raises(CallFailed, match="out: written after its end") as error:
        bench.verify(spec, spec.companions["forward"])
    assert error.value.status == "wrong" and error.value.fatal
