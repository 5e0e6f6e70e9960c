"""Statistics of timings: known distributions, stopping rules, and a race that noise alone does not win."""

from __future__ import annotations

import math
import random

import pytest

from sparsek_tune.tune import measure as module
from sparsek_tune.tune.measure import FIRST, MOST, CudaSampler, Estimate, _lower_rank, choose, estimate, measure, race


def source(draw, calls=None):
    def sample(count):
        if calls is not None:
            calls.append(count)
        return [draw() for _ in range(count)]

    return sample


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 9, 20, 100, 500])
def test_rank_is_the_largest_that_covers_the_median(n):
    def miss(rank):  # P(x_(rank) > median or x_(n-1-rank) < median)
        return 2 * sum(math.comb(n, i) for i in range(rank + 1)) / 2**n

    rank = _lower_rank(n)
    assert 0 <= rank <= (n - 1) // 2
    assert rank == 0 or miss(rank) <= 0.05
    assert rank == (n - 1) // 2 or miss(rank + 1) > 0.05


@pytest.mark.parametrize("draw", ["normal", "exponential", "two clocks"])
def test_intervals_cover_the_true_median_as_often_as_they_say(draw):
    rng = random.Random(1)
    draws = {
        "normal": (lambda: rng.gauss(1, 0.1), 1.0),
        "exponential": (lambda: 0.5 + rng.expovariate(1), 0.5 + math.log(2)),
        "two clocks": (lambda: rng.uniform(1, 1.1) if rng.random() < 0.7 else rng.uniform(2, 2.1), 1 + 0.1 * 5 / 7),
    }
    one, median = draws[draw]
    covered = sum(e.low <= median <= e.high for e in (estimate([one() for _ in range(31)]) for _ in range(1000)))
    assert 940 <= covered <= 995


def test_an_estimate_is_exact_on_few_samples():
    assert estimate([3.0, 1.0, 2.0]) == Estimate(2.0, 1.0, 3.0, 3)
    assert estimate([2.0] * 10) == Estimate(2.0, 2.0, 2.0, 10)


@pytest.mark.parametrize("bad", [[], [0.0], [1.0, math.nan], [1.0, -1.0], [math.inf]])
def test_senseless_samples_are_refused(bad):
    with pytest.raises(ValueError, match="finite, positive"):
        estimate(bad)


def test_quiet_timings_stop_at_once_and_noisy_ones_go_on():
    rng, quiet, noisy = random.Random(2), [], []
    assert measure(source(lambda: 1.0, quiet), 5.0).samples == FIRST == sum(quiet)
    result = measure(source(lambda: rng.gauss(1, 0.05), noisy), 5.0)
    assert FIRST < result.samples == sum(noisy) < MOST
    assert (result.high - result.low) / 2 <= 0.01 * result.median
    assert measure(source(lambda: rng.uniform(1, 3)), 5.0).samples >= MOST  # never within 1 %: the cap holds


def test_half_a_microsecond_is_near_enough():
    rng = random.Random(3)
    assert measure(source(lambda: rng.uniform(0.0030, 0.0034)), 5.0).samples == FIRST


def test_a_hopeless_config_gets_one_sample_or_the_first_batch():
    rng = random.Random(4)
    assert measure(source(lambda: 10.0), 5.0, hopeless_ms=1.0).samples == 1
    assert measure(source(lambda: rng.uniform(1.1, 1.6)), 5.0, hopeless_ms=1.0).samples == FIRST


def test_time_limits_sampling():
    rng = random.Random(5)
    assert measure(source(lambda: rng.uniform(1, 3)), 0.0).samples == FIRST


def test_a_race_finds_a_true_difference_under_common_drift():
    rng, clock = random.Random(6), [1.0]

    def contender(factor):
        def draw():
            clock[0] *= 1.002  # all slow down together: 1.7 times over the race
            return factor * clock[0] * rng.gauss(1, 0.01)

        return source(draw)

    results = race([contender(1.0), contender(1.1), contender(0.7)], 0.01, seed=0)
    assert choose(results[0], results[1:]) == 1
    assert len({r.samples for r in results}) == 1 and results[0].samples > 100


def test_rounds_are_interleaved():
    order = []
    results = race([source(lambda i=i: order.append(i) or 1.0) for i in range(4)], 0.0, seed=1)
    count = results[0].samples
    assert _lower_rank(count - 1) == 0 < _lower_rank(count)  # the fewest that a single outlier does not matter to
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(sorted(r) == [0, 1, 2, 3] for r in rounds) and len({tuple(r) for r in rounds}) > 3


def test_noise_alone_seldom_replaces_the_default():
    """Five finalists as fast as the default, in 400 races: false winners must stay few."""
    rng = random.Random(7)
    draw = source(lambda: math.exp(rng.gauss(0, 0.05)))
    wins = 0
    for seed in range(400):
        results = race([draw] * 6, 0.0, seed)
        wins += choose(results[0], results[1:]) is not None
    assert wins <= 12  # 3 %


def test_only_an_interval_below_the_defaults_wins():
    default = Estimate(1.0, 0.95, 1.05, 20)
    assert choose(default, [Estimate(0.96, 0.90, 1.0, 20), Estimate(0.8, 0.5, 0.96, 20)]) is None
    assert choose(default, [Estimate(0.9, 0.88, 0.94, 20), Estimate(0.8, 0.7, 0.9, 20)]) == 1
    assert choose(default, []) is None


class Gpu:
    """In place of torch and of the host's clock: a kernel of 0.1 ms, which ends later where the host launches it after
    the spin is over. host: seconds that the next launches take, the last one over and over."""

    def __init__(self, monkeypatch, *host):
        self.host, self.now, self.spins, self._spin_ends = list(host), 0.0, [], 0.0
        self.cuda = self
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setitem(__import__("sys").modules, "torch", self)
        self.int8 = self.empty = self.Event = self._any
        self.current_device = self.get_device_properties = self._any
        self.clock_rate = 1_000_000  # kHz

    def _any(self, *_, **__):
        return self if "enable_timing" not in __ else Event(self)

    def zero_(self):
        pass

    def synchronize(self):
        pass

    def _sleep(self, cycles):
        self.spins.append(cycles / 1e9)
        self._spin_ends = self.now + cycles / 1e9

    def run(self):
        self.now += self.host[0] if len(self.host) == 1 else self.host.pop(0)

    def late(self):
        return max(0.0, self.now - self._spin_ends)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.late = self.gpu.late()

    def elapsed_time(self, stop):
        return 0.1 + 1e3 * stop.late


def test_a_host_that_is_ahead_is_not_timed(monkeypatch):
    gpu = Gpu(monkeypatch, 1e-3)
    sample = CudaSampler(50 << 20)(gpu.run, warm_seconds=0.0)
    assert sample(3) == pytest.approx([0.1] * 3) and gpu.spins == pytest.approx([1.5e-3] * 3)


def test_samples_for_which_the_host_was_too_slow_are_taken_again(monkeypatch):
    gpu = Gpu(monkeypatch, 1e-3, 1e-3, 1e-3, 4e-3, 1e-3, 2e-3)
    sample = CudaSampler(50 << 20)(gpu.run, warm_seconds=0.0)  # two calls
    assert sample(3) == pytest.approx([0.1] * 3)
    assert gpu.spins == pytest.approx([1.5e-3] * 3 + [6e-3])  # one of three, and again
    assert sample(2) == pytest.approx([0.1] * 2) and gpu.spins[4:] == pytest.approx([6e-3] * 2)


def test_a_host_that_is_slower_than_the_longest_spin_is_taken_as_it_is(monkeypatch):
    gpu = Gpu(monkeypatch, 1e-3, 1e-3, 20e-3)
    sample = CudaSampler(50 << 20)(gpu.run, warm_seconds=0.0)
    (time,) = sample(1)
    assert time == pytest.approx(0.1 + 20 - 7.5) and gpu.spins == pytest.approx([1.5e-3, 7.5e-3])
