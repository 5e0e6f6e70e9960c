"""A document as the benchmark writes it, without running one."""

from __future__ import annotations

from sparsek_tune.presets import Shape
from sparsek_tune.problem import target_device


def time(ms):
    return {"median": ms, "low": 0.9 * ms, "high": 1.1 * ms, "samples": 9}


def entry(n, k=1024, w=0, distribution="iid", scale=1.0):
    ms = scale * n / 65536
    peer = {"forward": time(10 * ms), "forward_backward": time(30 * ms)}
    return {
        "problem": vars(Shape(n=n, k=k, w=w)), "distribution": distribution,
        "configs": {"forward": {"config": {}, "grade": "exact", "reason": ""}},
        "check": {"reduced": {"passed": True, "reason": None, "tolerance": 5e-3, "out": 1e-3, "dq": 2.5e-3}},
        "stages": {name: time(ms * x) for name, x in zip(("threshold", "schedule", "forward", "dq", "dkv"),
                                                          (0.4, 0.1, 2, 3, 4), strict=True)},
        "index": time(ms * 0.45), "sort": time(0.1), "index_bytes_per_token": 160.0,
        "totals": {name: time(ms * x) for name, x in zip(("forward", "forward_graph", "forward_backward"),
                                                          (2.5, 2.4, 9.6), strict=True)},
        "memory": {"forward": 1 << 30, "forward_backward": 1 << 31},
        "host_us": {"forward": time(50.0), "forward_after_idle": time(60.0), "forward_with_grad": time(70.0)},
        "tflops": {"kernel_forward": 400.0, "forward": 320.0, "kernel_backward": 250.0, "forward_backward": 280.0},
        "index_share": 0.18,
        "peers": {
            "cudnn": {**peer, "ratio": {"forward": 4.0, "forward_backward": 3.125}},
            "nsa": {"failed": "OutOfMemoryError: no room", "ratio": {}},
        },
    }  # fmt: skip


def document(*entries):
    return {
        "schema": 2, "date": "2026-01-01T00:00:00+00:00", "command": "sparsek-tune bench",
        "device": target_device("cuda:90").as_dict(), "versions": {"torch": "2.11.0", "triton": "3.6.0", "cuda": ""},
        "protocol": {"l2": "cold"}, "peers": {"cudnn": {"note": "dense", "version": "torch 2.11.0"}},
        "missing": {"adasplash": "the package adasplash is not installed"}, "cases": list(entries),
    }  # fmt: skip
