"""Host time is that of the call alone, whatever the device still does."""

from __future__ import annotations

import time

import pytest

from sparsek_tune.bench import machine


def test_host_time_leaves_the_device_out():
    waits = []

    def synchronize():
        waits.append(time.sleep(0.002))

    e = machine.host_time(lambda: time.sleep(0.0005), synchronize, calls=20)
    assert 450 < e.low <= e.median <= e.high < 1900 and e.samples == 20  # microseconds
    assert len(waits) == 21  # idle before every call


def test_once_is_the_second_call():
    calls = []

    def run():
        calls.append(time.sleep(0 if calls else 0.05))

    assert machine.once(run, lambda: None) < 0.04 and len(calls) == 2


@pytest.mark.gpu
def test_the_gpu_is_timed_measured_and_captured():
    import torch

    from sparsek_tune.problem import current_device

    x = torch.zeros(1 << 24, device="cuda")
    cuda = machine.Cuda(current_device().l2)
    assert 0 < cuda.time(x.sum, 0.1).median < 10 and cuda.once(x.sum) < 1 and cuda.alive()
    assert cuda.peak(lambda: x + 1) == x.numel() * 4
    assert 1 < cuda.host(lambda: x.add_(0)).median < 1000
    before = x[0].item()
    replay = cuda.graph(lambda: x.add_(1))
    captured = x[0].item()
    replay()
    assert x[0].item() == captured + 1 > before
