"""The GPU as the benchmark sees it: time, host time, memory, graphs. Tests put another machine in its place."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, Protocol

from sparsek_tune.tune.measure import CudaSampler, Estimate, estimate, measure

Run = Callable[[], Any]
HOST_SAMPLES = 100
IN_A_ROW = 10  # calls whose launches the driver surely queues


class Machine(Protocol):
    """Where functions run. device: the torch device of all tensors."""

    device: str

    def time(self, run: Run, seconds: float) -> Estimate:
        """Time of ``run`` in ms, sampled for at most ``seconds``."""
        ...

    def host(self, run: Run, in_a_row: int) -> Estimate:
        """Microseconds until ``run`` returns, each of that many calls in a row, the device idle before."""
        ...

    def once(self, run: Run) -> float:
        """Seconds of wall time of a call of ``run`` that is not the first."""
        ...

    def peak(self, run: Run) -> int:
        """Bytes that ``run`` takes at most, above what is allocated already."""
        ...

    def graph(self, run: Run) -> Run:
        """``run`` captured: a function that replays it."""
        ...

    def alive(self) -> bool:
        """Whether the device still answers; a wrong memory access in a kernel ends that for the whole process."""
        ...

    def free(self) -> None:
        """Give back the memory of tensors that nobody holds any more."""
        ...


def host_time(run: Run, synchronize: Run, in_a_row: int = 1, samples: int = HOST_SAMPLES) -> Estimate:
    """The median of what a call of ``run`` takes in microseconds (not ms), with its interval; 10 calls warm it up. A
    sample is the mean of that many calls in a row. As in ``timeit`` garbage is not collected meanwhile."""
    for _ in range(10):
        run()
    times = []
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(samples):
            synchronize()
            start = time.perf_counter()
            for _ in range(in_a_row):
                run()
            times.append((time.perf_counter() - start) / in_a_row * 1e6)
    finally:
        if collects:
            gc.enable()
    synchronize()
    return estimate(times)


def once(run: Run, synchronize: Run) -> float:
    """Seconds of wall time of the second call of ``run``: the first one may compile."""
    run()
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


class Cuda:
    """The current CUDA device. l2: bytes of its L2 cache."""

    device = "cuda"

    def __init__(self, l2: int) -> None:
        import torch

        self._cuda = torch.cuda
        self._sampler = CudaSampler(l2)

    def time(self, run: Run, seconds: float) -> Estimate:
        return measure(self._sampler(run), seconds)

    def host(self, run: Run, in_a_row: int) -> Estimate:
        return host_time(run, self._cuda.synchronize, in_a_row)

    def once(self, run: Run) -> float:
        return once(run, self._cuda.synchronize)

    def peak(self, run: Run) -> int:
        run()  # compiles, and fills workspaces that stay
        self.free()
        before = self._cuda.memory_allocated()
        self._cuda.reset_peak_memory_stats()
        run()
        self._cuda.synchronize()
        return self._cuda.max_memory_allocated() - before

    def graph(self, run: Run) -> Run:
        stream = self._cuda.Stream()
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            run()
        self._cuda.current_stream().wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            results = run()

        def replay(keep: Any = results) -> None:  # the results live in the graph's memory
            graph.replay()

        return replay

    def alive(self) -> bool:
        try:
            self._cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def free(self) -> None:
        gc.collect()
        self._cuda.empty_cache()
