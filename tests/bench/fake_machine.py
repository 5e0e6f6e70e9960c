"""A machine that is the CPU, and stages that are the reference: the whole benchmark runs without a GPU."""

from __future__ import annotations

import time

import torch

from sparsek_tune import reference
from sparsek_tune.bench import machine, ours
from sparsek_tune.tune.measure import estimate


class Cpu:
    """Times by the wall clock, one call each. peaks: what ``peak`` answers."""

    device = "cpu"

    def __init__(self, l2: int = 0) -> None:
        self.answers, self.timed = True, 0

    def time(self, run, seconds):
        self.timed += 1
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            samples.append((time.perf_counter() - start) * 1e3)
        return estimate(samples)

    def host(self, run, in_a_row):
        return machine.host_time(run, lambda: None, in_a_row, samples=3)

    def once(self, run):
        return machine.once(run, lambda: None)

    def peak(self, run):
        run()
        return 1 << 20

    def graph(self, run):
        return run

    def alive(self):
        return self.answers

    def free(self):
        pass


def reference_stages(i, configs):
    """In place of ``ours.stages``: the reference, in two parts; schedule and dkv do nothing worth naming."""
    assert set(configs) == {"threshold", "schedule", "forward", "dq", "dkv"}
    options = (i.k, i.window, i.scale, i.gate)
    tensors = (i.query, i.key, i.value, i.scores)
    selection = reference.select(i.scores, i.k, i.window)
    out, lse, *_ = reference.attention_forward(*tensors, *options)
    run = {
        "threshold": lambda: reference.select(i.scores, i.k, i.window),
        "schedule": lambda: selection.expiry + 1,
        "forward": lambda: reference.attention_forward(*tensors, *options),
        "dq": lambda: reference.attention_backward(i.dout, *tensors, out, lse, selection, *options),
        "dkv": lambda: torch.zeros_like(i.key),
    }
    return ours.Stages(run, run["threshold"], list(selection))
