"""What a call costs the CPU, in microseconds: from the Python call to the return after the last launch.

    python benchmarks/host_time.py [--n 4096] [--k 512] [--window 512]

Every figure is the median of batches that are short enough for the launch queue not to fill, on a GPU that is idle when
a batch starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from sparsek_tune import arguments, launcher, ops, replay
from sparsek_tune.bench.machine import host_time
from sparsek_tune.ops import sparsek_attention


@triton.jit(do_not_specialize=["n"])
def forty(
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11,
    n, scale, cap, x0, x1, x2, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Forty arguments, of the kinds that the attention's kernel has, and nothing to do."""
    if n < 0:
        tl.store(a0, 1.0)


def microseconds(function: Callable[[], Any], calls: int = 20, batches: int = 40) -> float:
    """Per call of ``function``."""
    return host_time(function, torch.cuda.synchronize, calls, batches).median


def observed(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function with every launch made by Triton's own code."""

    def run() -> Any:
        before, launcher.observed = launcher.observed, lambda: True
        try:
            return function()
        finally:
            launcher.observed = before

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    n, k, window = options.n, options.k, options.window
    shapes = ((1, 32, n, 128), (1, 8, n, 128), (1, 8, n, 128))
    query, key, value = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    tensors = query, key, value, torch.randn(1, 8, n, device="cuda")
    wanting = [t.clone().requires_grad_() for t in tensors]
    dout = torch.randn_like(query)
    args = (*[tensors[3]] * 13, *[128] * 12, n, 0.5, 512, 32, 48, 64)
    meta = {**dict.fromkeys("ABCDEFGHK", 16), "num_warps": 4}

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return sparsek_attention(*inputs, k, window=window)

    def both() -> Any:
        return torch.autograd.grad(call(*wanting), wanting, dout)

    stubbed = ops._replayed
    results = tuple(t.detach() for t in ops.ATTENTION(*tensors, k, window, 0.1, "kv"))

    def dispatched() -> Any:
        return ops.ATTENTION(*tensors, k, window, 0.1, "kv")

    print(f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}, N {n}, k {k}")
    rows = {
        "one launch, 40 arguments, Triton": lambda: forty[(1, 1)](*args, enable_fp_fusion=True, **meta),
        "one launch, 40 arguments, direct": lambda: launcher.launch(forty, (1, 1), args, meta),
        "forward, Triton's launches": observed(lambda: call(*tensors)),
        "forward": lambda: call(*tensors),
        "forward that saves for backward": lambda: call(*wanting),
        "forward and backward, Triton's launches": observed(both),
        "forward and backward": both,
    }
    for name, function in rows.items():
        print(f"{name:42}{microseconds(function, 5 if 'backward' in name else 20):8.1f}")

    def unseen() -> torch.Tensor:
        replay.clear()
        return call(*tensors)

    print(f"{'forward of a kind not seen before':42}{microseconds(unseen):8.1f}")
    ops._replayed = lambda *_: tuple(t.detach() for t in results)
    print(f"{'op dispatch alone (no kernels)':42}{microseconds(dispatched):8.1f}")
    print(f"{'public function alone (no kernels)':42}{microseconds(lambda: call(*tensors)):8.1f}")
    ops._replayed = stubbed
    checks = (*tensors, k, window, None, "kv")
    print(f"{'argument checks, seen before':42}{microseconds(lambda: arguments.check_attention(*checks)):8.1f}")
    print(f"{'argument checks':42}{microseconds(lambda: arguments._check_attention(*checks)):8.1f}")
    plans = [p for p in replay._plans.values() if isinstance(p, replay.Plan)]
    print("launches of the calls above:", *("+".join(str(len(phase.steps)) for phase in p.phases) for p in plans))


if __name__ == "__main__":
    main()
