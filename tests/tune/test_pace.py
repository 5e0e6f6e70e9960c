"""Rates and times left, by a clock that the tests turn."""

from __future__ import annotations

import math

import faults
import pytest

from sparsek_tune.tune.pace import Outlook, Pace, Shares
from sparsek_tune.tune.types import Event


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_what_was_known_before_and_setting_up_do_not_count(clock):
    pace = Pace(clock)
    clock.now += 50  # setting up
    assert pace.rate(30) is None and pace.left(30, 80, clock.now + 100) == 100
    pace.begin(30)
    clock.now += 10
    assert pace.rate(30) is None  # none was settled yet
    assert pace.rate(35) == pytest.approx(0.5)
    assert pace.left(35, 80, math.inf) == pytest.approx(90)


def test_whatever_ends_first(clock):
    pace = Pace(clock)
    pace.begin(0)
    clock.now += 10
    assert pace.left(20, 80, clock.now + 1000) == pytest.approx(30)  # the space
    assert pace.left(20, 80, clock.now + 12) == pytest.approx(12)  # the time
    assert pace.left(20, 80, clock.now - 1) == 0 and pace.left(80, 80, clock.now + 12) == 0


def outlook(clock, kernels, **options):
    made = Outlook(150.0, clock=clock, **options)
    made.kernels = kernels

    def see(kind, template, left=None):
        return made.see(Event(kind, template, faults.PROBLEM, 0, 0, None, "", seconds_left=left))

    return see


def test_kernels_to_come_last_as_long_as_those_before(clock):
    see = outlook(clock, 4)
    assert see("start", "a", 150.0).run_seconds_left == 4 * 150  # nothing but the limits is known
    clock.now += 10
    event = see("trial", "a", 30.0)  # 40 in all
    assert (event.kernels_done, event.kernels) == (0, 4) and event.run_seconds_left == pytest.approx(30 + 3 * 40)
    clock.now += 20
    event = see("done", "a", 0.0)  # 30 in all
    assert event.kernels_done == 1 and event.run_seconds_left == pytest.approx(3 * 30)
    see("start", "b", 150.0)
    clock.now += 5
    assert see("trial", "b", 45.0).run_seconds_left == pytest.approx(45 + 2 * 30)


def test_results_that_are_looked_up_do_not_count(clock):
    see = outlook(clock, 3)
    see("start", "a", 150.0)
    clock.now += 0.1
    assert see("done", "a", 0.0).run_seconds_left == 2 * 150
    see("start", "b", 150.0)
    clock.now += 10
    see("trial", "b", 10.0)
    clock.now += 10
    assert see("done", "b", 0.0).run_seconds_left == pytest.approx(20)


def test_the_budget_ends_the_run(clock):
    see = outlook(clock, 9, end=clock.now + 60)
    assert see("start", "a", 150.0).run_seconds_left == 150  # that one takes its time
    clock.now += 10
    assert see("trial", "a", 20.0).run_seconds_left == pytest.approx(50)
    clock.now += 60
    assert see("done", "a", 0.0).run_seconds_left == 0
    assert see("note", "b").run_seconds_left == 0


def test_searches_side_by_side_share_what_is_to_come(clock):
    see = outlook(clock, 6)
    see("start", "a", 100.0)
    see("start", "b", 100.0)
    clock.now += 20
    see("trial", "a", 20.0)
    event = see("trial", "b", 20.0)  # 40 each, four to come
    assert event.run_seconds_left == pytest.approx((20 + 20 + 4 * 40) / 2)
    clock.now += 20
    event = see("done", "a", 0.0)
    assert event.run_seconds_left == pytest.approx((0 + 4 * 40) / 2) and event.kernels_done == 1
    see = outlook(clock, 2)
    see("start", "a", 5.0)
    assert see("start", "b", 100.0).run_seconds_left == 100  # the longest one decides


def test_a_search_that_has_raced_stands_in_nobodys_way(clock):
    see = outlook(clock, 3)
    see("start", "a", 100.0)
    see("race", "a", 1.0)
    clock.now += 1
    assert see("start", "b", 20.0).run_seconds_left == pytest.approx(20 + 1 * (1 + 20) / 2)  # one after the other
    clock.now += 19
    see("race", "b", 1.0)
    clock.now += 1
    see("start", "c", 20.0)
    see("done", "a", 0.0)
    assert see("done", "b", 0.0).run_seconds_left == 20
    assert see("trial", "c", 15.0).run_seconds_left == 15


def test_how_long_searches_take_does_not_count_those_that_go_on_beside_what_has_raced(clock):
    see = outlook(clock, 10)
    for left, (before, name) in zip(range(9, 0, -1), zip(" abcdefgh", "abcdefghi", strict=True), strict=True):
        see("start", name, 30.0)
        clock.now += 29
        see("trial", name, 1.0)
        event = see("race", name, 1.0)
        clock.now += 1
        if before != " ":
            see("trial", before, 1.0)  # the winner was wrong
            see("race", before, 1.0)
            event = see("done", before, 0.0)
        assert event.run_seconds_left == pytest.approx(30 * left, abs=1.1)


def test_a_search_that_cannot_tell_is_taken_at_its_limit(clock):
    see = outlook(clock, 1)
    see("start", "a", None)
    clock.now += 50
    assert see("trial", "a", None).run_seconds_left == pytest.approx(100)


def test_the_kernels_of_a_problem_share_its_time(clock):
    a, b = faults.PROBLEM, faults.PROBLEM._replace(n=2048)
    shares = Shares(100.0, math.inf, [a, a, a, a, b], clock)
    assert shares.of(a) == 25
    clock.now += 60  # what setting up takes is missing to all
    assert shares.of(a) == 10
    clock.now += 1
    shares.done(a)
    assert shares.of(a) == 13
    clock.now += 100
    assert shares.of(a) <= 0 and shares.of(a, 5.0) == 5
    assert shares.of(b) == 100  # begins now


def test_the_end_of_the_run_limits_every_share(clock):
    a, b = faults.PROBLEM, faults.PROBLEM._replace(n=2048)
    shares = Shares(100.0, clock.now + 30, [a, b, b], clock)
    assert shares.of(a, 20.0) == 10
    shares.done(a)
    assert shares.of(b) == 15
    clock.now += 40
    assert shares.of(b, 20.0) == 0
