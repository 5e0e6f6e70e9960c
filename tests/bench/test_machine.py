"""Host time is that of the call alone, whatever the device still does."""

from __future__ import annotations

import gc
import time

import pytest

from sparsek_tune.bench import machine


def test_host_time_leaves_the_device_out():
    waits = []

    def synchronize():
        waits.append(time.sleep(0.002))

    e = machine.host_time(lambda: time.sleep(0.0005), synchronize, samples=20)
    assert 450 < e.low <= e.median <= e.high < 1900 and e.samples == 20  # microseconds
    assert len(waits) == 21  # idle before every call


def test_host_time_of_calls_in_a_row_is_each_call_s():
    calls, waits = [], []
    e = machine.host_time(lambda: calls.append(time.sleep(0.0005)), lambda: waits.append(1), in_a_row=4, samples=20)
    assert 450 < e.low <= e.median <= e.high < 1900 and e.samples == 20
    assert len(calls) == 10 + 80 and len(waits) == 21


@pytest.mark.parametrize("collects", [True, False])
def test_host_time_leaves_garbage_collection_as_it_was(collects):
    before = gc.isenabled()
    seen = []
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(RuntimeError, match="eleventh"):

            def run():
                seen.append(gc.isenabled())
                if len(seen) == 11:
                    raise RuntimeError("eleventh")

            machine.host_time(run, lambda: None)
        assert gc.isenabled() == collects and seen == [collects] * 10 + [False]
    finally:
        (gc.enable if before else gc.disable)()


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
    assert 1 < cuda.host(lambda: x.add_(0), 10).median < 1000
    before = x[0].item()
    replay = cuda.graph(lambda: x.add_(1))
    captured = x[0].item()
    replay()
    assert x[0].item() == captured + 1 > before
