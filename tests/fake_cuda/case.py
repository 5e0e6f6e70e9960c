"""Run by tests/test_launcher.py, with the driver of cuda.c in place of CUDA's: random launches by Triton's own way and
by ``sparsek_tune.launcher`` must ask the driver for the same, to the byte. Prints how many were compared."""

import ctypes
import os
import random

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaUtils
from triton.runtime import driver

from sparsek_tune import launcher

WIDTH = {"i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "i1": 1, "u1": 1}
STREAM = 4711


class Driver(CudaDriver):
    def __init__(self):
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: STREAM

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@triton.jit(do_not_specialize=["n", "rows"])
def kernel(a, b, c, s0, s1, n, rows, scale, cap, A: tl.constexpr, FLAG: tl.constexpr):
    x = tl.load(a + s0 * tl.program_id(0) + s1) * scale
    if FLAG:
        x += tl.load(b + n + rows)
    tl.store(c + cap + tl.arange(0, A), x)


def compare(fake, rng, pool):
    dtype = rng.choice([torch.float32, torch.bfloat16])
    tensors = [pool[dtype][rng.choice([0, 0, 0, 1, 8, 16]) :] for _ in range(3)]
    ints = [rng.choice([0, 1, 2, 15, 16, 48, 2**31 - 16, 2**31, 2**40]) for _ in range(2)]
    n, rows, cap = (rng.choice([0, 1, 7, 16, 2**31 - 1, 2**31]) for _ in range(3))
    args = (*tensors, *ints, n, rows, rng.choice([0.5, 1.0]), cap)
    meta = {"A": rng.choice([1, 16]), "FLAG": rng.choice([True, False]), "num_warps": rng.choice([1, 4])}
    grid = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 3)))
    compiled = kernel[grid](*args, enable_fp_fusion=True, **meta)
    widths = [8 if ty[0] == "*" else WIDTH[ty] for ty in compiled.src.signature.values() if ty != "constexpr"]
    fake.fake_expect((ctypes.c_int * len(widths))(*widths), len(widths))
    size = 64 + 8 * len(widths)
    compiled = kernel[grid](*args, enable_fp_fusion=True, **meta)
    expected, queries = ctypes.string_at(fake.fake_seen(), size), fake.fake_queries()
    for _ in range(2):  # the first may still be an ordinary one
        before = fake.fake_launches()
        launcher.launch(kernel, grid, args, meta)
        assert ctypes.string_at(fake.fake_seen(), size) == expected, (args, meta, grid)
        assert fake.fake_launches() == before + 1
        asked = fake.fake_queries() - queries
        queries = fake.fake_queries()
    assert asked == 0, "the second launch asks about no pointer"
    bound = launcher.bind(compiled)
    bound(grid, STREAM, tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in (*args, 16, True)))
    assert ctypes.string_at(fake.fake_seen(), size) == expected


def hooks(fake, pool):
    """A hook sees every launch; so does whoever replaces JITFunction.run."""
    args, meta = (*[pool[torch.float32]] * 3, 1, 1, 1, 1, 1.0, 1), {"A": 16, "FLAG": True, "num_warps": 4}
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    for i in range(3):
        launcher.launch(kernel, (1,), args, meta)
        assert len(seen) == i + 1 and seen[i].get()["name"] == "kernel"
    knobs.runtime.launch_enter_hook.remove(seen.append)
    assert not launcher.observed()
    knobs.compilation.instrumentation_mode = "other"
    assert launcher.observed()
    knobs.compilation.instrumentation_mode = ""
    assert not launcher.observed()


def main():
    fake = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"))
    fake.fake_seen.restype = ctypes.c_void_p
    driver.set_active(Driver())
    assert CudaUtils.instance is driver.active.utils
    pool = {d: torch.empty(64, dtype=d) for d in (torch.float32, torch.bfloat16)}
    rng, cases = random.Random(0), int(os.environ.get("CASES", "120"))
    for _ in range(cases):
        compare(fake, rng, pool)
    hooks(fake, pool)
    print("compared", cases, triton.__version__)


if __name__ == "__main__":
    main()
