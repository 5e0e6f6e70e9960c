"""Small Triton kernels that do what kernels must not, and a stage that runs them: on a GPU all, in the interpreter what
it survives. A config says which: Config(tile=..., fault=NAME); "none" computes 2 x + 1.
"""

from __future__ import annotations

import os

import faults
import torch
import triton
import triton.language as tl

from sparsek_tune import launch
from sparsek_tune.problem import Problem
from sparsek_tune.tune import stages
from sparsek_tune.tune.redzone import Fingerprint, redzones

FACTORY, SPOILT = "failing_kernels:make", "failing_kernels:make_spoilt"
PROBLEM = Problem.of("bf16", 64, 4, "kv", 64, 32, 1024, 8)
N, BLOCK = 10_000, 1024
FAR = 1 << 40  # elements: no memory of the process lies there


@triton.jit
def affine(x_ptr, out_ptr, n, a, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) * a + 1.0, mask=at < n)


@triton.jit
def without_mask(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0) * 2.0 + 1.0)


@triton.jit
def neighbours(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Reads one entry too far."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine, next_one = tl.load(x_ptr + at, mask=at < n), tl.load(x_ptr + at + 1, mask=at < n)
    tl.store(out_ptr + at, mine * 2.0 + 1.0 + 0.0 * next_one, mask=at < n)


@triton.jit
def put(out_ptr, at, value):
    tl.store(out_ptr + at, value)


@triton.jit
def spin(flag_ptr):
    """Runs until somebody sets the flag, and nobody does."""
    seen = tl.load(flag_ptr, volatile=True)
    while seen == 0.0:
        seen = tl.load(flag_ptr, volatile=True)
    tl.store(flag_ptr, seen + 1.0)


def run(fault, x):
    """``out``, and what the fault does besides."""
    out = x.new_empty(x.shape)
    blocks = (triton.cdiv(N, BLOCK),)
    if fault == "writes after the end":
        without_mask[blocks](x, out, N, BLOCK=BLOCK)
        return out
    if fault == "reads after the end":
        neighbours[blocks](x, out, N, BLOCK=BLOCK)
        return out
    factor = {"nan": float("nan"), "a hundredth off": 2.02}.get(fault, 2.0)
    affine[blocks](x, out, N, factor, BLOCK=BLOCK)
    match fault:
        case "writes before the start":
            put[(1,)](out, -1, 1.0)
        case "writes an input":
            put[(1,)](x, 17, 0.5)
        case "illegal address":
            put[(1,)](out, FAR, 1.0)
        case "hang":
            spin[(1,)](torch.zeros(1, device=x.device))
            faults.log("hang fake 0")
        case "out of memory":
            run.kept = []
            while True:  # what it took stays taken as long as its process lives
                run.kept.append(torch.empty(1 << 30, dtype=torch.int8, device=x.device))
    return out


class Stage:
    def __init__(self, spec, device):
        self.device = device

    def prepare(self):
        faults.log(f"measure fake {os.getpid()}")
        with redzones():
            self.x = torch.empty(N, device=self.device).copy_(torch.arange(N) / N)
        self.want = self.x.double() * 2 + 1
        self.shared = Fingerprint([("x", self.x), ("the reference", self.want)])

    def verify(self, config, cases=True):
        with redzones() as zones:
            out = run(config["fault"], self.x)
        zones.check({"out": out})
        error = float((out.double() - self.want).norm() / self.want.norm())
        return None if error <= 1e-5 else f"out: relative error {error:.2e}"

    def verify_cases(self, config):
        if not hasattr(self, "x"):
            self.prepare()
        return self.verify(config)

    def check(self):
        self.shared.check()

    def sampler(self, config):
        sampler = stages.CudaSampler(50 << 20)
        return sampler(lambda: [run("none", self.x) for _ in range(1024 // config["tile"])])


def make(spec, mode):
    return faults.Stage(spec, mode) if mode == "compile" else Stage(spec, stages._TORCH_DEVICE[mode])


def make_spoilt(spec, mode):
    """The real stages, but that a kernel runs after forward's that writes one row beyond its output."""
    real = launch.forward

    def forward(*args):
        out, lse = real(*args)
        put[(1,)](out, out.numel() + 3, 1.0)
        return out, lse

    launch.forward = forward
    return stages.make(spec, mode)
