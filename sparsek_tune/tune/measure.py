"""Timing: cold-L2 samples from CUDA events, medians with confidence intervals, and the last race against the default.

The statistics are pure functions of samples; the GPU comes in through a ``sample(count) -> list of ms`` function alone.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Sample = Callable[[int], list[float]]  # takes a count, returns that many samples in ms

CLOSE_ENOUGH = 0.01  # half width of the interval over the median at which sampling stops
TIMER_MS = 0.0005  # ... or half width in ms: finer than events resolve
FIRST, BATCH, MOST = 7, 10, 500
_ROUNDS = 9  # of a race, at least: with fewer a single outlier would be in the interval
CONFIDENCE = 0.95
_LONGEST_SPIN = 7.5e-3  # seconds
_ATTEMPTS = 4  # at samples that the host was too slow for; the last ones are taken as they are
PROTOCOL: dict[str, Any] = {
    "timer": "cuda-events",
    "l2": "cold",
    "statistic": "median",
    "interval": CONFIDENCE,
    "input": "normal, scores std 3",
    "layout": "bnhd",
}


class Estimate(NamedTuple):
    """A median with its confidence interval, all in ms, from ``samples`` samples."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def settled(self) -> bool:
        """Whether more samples would not be worth their time."""
        half = (self.high - self.low) / 2
        return half <= CLOSE_ENOUGH * self.median or half <= TIMER_MS

    def beats(self, other: Estimate) -> bool:
        """Whether this is faster beyond the noise of both."""
        return self.high < other.low


def estimate(samples: Sequence[float]) -> Estimate:
    """The median and its 95 % interval by order statistics: no assumption on the distribution.

    The number of samples below the true median is binomial(n, 1/2); with too few samples for the confidence (n < 6) the
    interval is the whole range. Raises ValueError for no samples or one that is not finite and positive.
    """
    if not samples or not all(math.isfinite(s) and s > 0 for s in samples):
        raise ValueError(f"samples must be finite, positive times, but are {list(samples)[:5]}")
    ordered, n = sorted(samples), len(samples)
    rank = _lower_rank(n)
    return Estimate(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank], n)


def _lower_rank(n: int) -> int:
    """The largest r (from 0) such that [x_(r), x_(n-1-r)] of n ordered samples covers the median with 95 %."""
    tail, term, rank = 0.0, 0.5**n, 0
    for r in range(n // 2):  # tail = P(binomial <= r): the chance that x_(r) lies above the median
        tail += term
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank = r
        term *= (n - r) / (r + 1)
    return rank


def measure(sample: Sample, seconds: float, hopeless_ms: float = math.inf) -> Estimate:
    """Sample until the interval is within 1 % or 0.5 us, ``seconds`` of wall time are over, or the whole interval lies
    above ``hopeless_ms``."""
    end = time.monotonic() + seconds
    samples = sample(1)
    if samples[0] > 2 * hopeless_ms:
        return estimate(samples)
    samples += sample(FIRST - 1)
    while True:
        now = estimate(samples)
        if now.settled or now.low > hopeless_ms or len(samples) >= MOST or time.monotonic() >= end:
            return now
        samples += sample(BATCH)


def race(contenders: Sequence[Sample], seconds: float, seed: int = 0) -> list[Estimate]:
    """Estimates from interleaved rounds: each round samples every contender once, in a new random order, so that drift
    of clocks and temperature meets all alike. The number of rounds follows from the first ones' wall time (it must not
    depend on the outcome: stopping when one leads would favour luck)."""
    order, rng = list(range(len(contenders))), random.Random(seed)
    samples: list[list[float]] = [[] for _ in contenders]

    def rounds(count: int) -> None:
        for _ in range(count):
            rng.shuffle(order)
            for i in order:
                samples[i] += contenders[i](1)

    start = time.monotonic()
    rounds(3)
    each = (time.monotonic() - start) / 3
    rounds(max(_ROUNDS - 3, min(200, int(seconds / max(each, 1e-6)) - 3)))
    return [estimate(s) for s in samples]


def choose(default: Estimate, others: Sequence[Estimate]) -> int | None:
    """The index of the fastest of ``others`` that beats the default, or None: the default stays."""
    better = [i for i, e in enumerate(others) if e.beats(default)]
    return min(better, key=lambda i: others[i].median) if better else None


class _Spin:
    """How long the GPU spins before a sample, at most _LONGEST_SPIN; grows with what the host is seen to need."""

    def __init__(self, seconds: float) -> None:
        self.seconds = min(seconds, _LONGEST_SPIN)


class CudaSampler:
    """Times a function on the current CUDA device. l2: bytes of its L2 cache.

    Before every sample twice the L2 is overwritten. A short spin on the GPU, as long as the host needs to launch the
    function, then keeps the host ahead: the events time the kernels, not the launches. A sample for which the host
    needed longer, as on a busy machine, is taken again after a longer spin.
    """

    def __init__(self, l2: int) -> None:
        import torch

        self._torch = torch
        self._flush = torch.empty(max(2 * l2, 16 << 20), dtype=torch.int8, device="cuda")
        clock = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "clock_rate", 0)  # kHz
        self._cycles_per_second = (clock or 2_000_000) * 1e3

    def __call__(self, run: Callable[[], Any], warm_seconds: float = 0.02) -> Sample:
        """A Sample of ``run``, warmed up (compiled, clocks raised) for at least two calls."""
        spin = _Spin(1.5 * self._warm_up(run, warm_seconds))
        return lambda count: self._samples(run, count, spin)

    def _warm_up(self, run: Callable[[], Any], seconds: float) -> float:
        """Seconds of host time of one launch."""
        cuda = self._torch.cuda
        run()
        cuda.synchronize()
        end, host = time.monotonic() + seconds, math.inf
        while True:
            start = time.perf_counter()
            run()
            host = min(host, time.perf_counter() - start)
            cuda.synchronize()
            if time.monotonic() >= end:
                return host

    def _samples(self, run: Callable[[], Any], count: int, spin: _Spin) -> list[float]:
        kept: list[float] = []
        for attempt in range(_ATTEMPTS):
            before = spin.seconds
            times, hosts = self._sample(run, count - len(kept), before)
            last = attempt == _ATTEMPTS - 1 or before >= _LONGEST_SPIN
            kept += [t for t, host in zip(times, hosts, strict=True) if last or host <= before]
            if len(kept) == count:
                break
            spin.seconds = min(_LONGEST_SPIN, max(before, 1.5 * max(hosts)))
        return kept

    def _sample(self, run: Callable[[], Any], count: int, spin: float) -> tuple[list[float], list[float]]:
        """Times (ms) of so many calls, each after a spin (s), and the host's seconds to launch each."""
        cuda, hosts = self._torch.cuda, []
        pairs = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, stop in pairs:
            self._flush.zero_()
            cuda._sleep(int(spin * self._cycles_per_second))
            began = time.perf_counter()
            start.record()
            run()
            stop.record()
            hosts.append(time.perf_counter() - began)
        cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs], hosts
