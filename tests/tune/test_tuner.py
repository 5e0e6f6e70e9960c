"""Whole runs over stages that fail in every way: the run goes on, the store tells the truth, the right config wins."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time

import faults
import pytest

from sparsek_tune.db import reader
from sparsek_tune.db.reader import Winners
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune import EFFORTS, judge, search, types
from sparsek_tune.tune.channel import MachineError
from sparsek_tune.tune.pool import CompilePool
from sparsek_tune.tune.suite import Searching
from sparsek_tune.tune.tuner import Run, tune

TINY = types.Effort(40, 60.0, 0.01, 3, 0.01, 4, 2, timeout=3.0)
BAD = {  # fault: status
    "wrong": "wrong",
    "hang": "timeout",
    "kill": "runtime",
    "segfault": "runtime",
    "exit": "runtime",
    "out of memory": "runtime",
    "illegal address": "runtime",
    "raises": "runtime",
    "compile error": "compile",
    "compile hang": "timeout",
    "compile crash": "compile",
    "spills": "infeasible",
    "shared memory": "infeasible",
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setitem(EFFORTS, "tiny", TINY)
    with Store(tmp_path / "cache.db") as store:
        yield store


def go(store, *templates, problems=(faults.PROBLEM,), **options):
    options = {"effort": "tiny", "factory": faults.FACTORY, **options}
    return tune(problems, faults.DEVICE, store, templates={t.name: t for t in templates}, **options)


def latest(store, template, problem=faults.PROBLEM):
    return {r.config: r.result for r in store.measurements(faults.DEVICE, template, problem)}


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().split()[2] == "Z"
    except FileNotFoundError:
        return True


def killed(pid):
    """Whether the process is gone, or on its way: the kernel takes a moment to take a large one apart."""
    end = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return gone(pid)


def test_every_fault_costs_its_candidate_alone(store, capfd):
    t = faults.template(tiles=(32, 32), faults=("none", "prints", *BAD))
    events = []
    (row,) = go(store, t, on_event=events.append)
    results = {c["fault"]: r for c, r in latest(store, t).items()}
    assert {f: results[f].status for f in BAD} == BAD
    assert results["none"].status == results["prints"].status == "ok"
    assert "SIGSEGV" in results["segfault"].reason and "about to fault" in results["segfault"].reason
    assert "exit status 3" in results["exit"].reason and "out of memory" in results["out of memory"].reason
    assert "4096 bytes" in results["spills"].reason and "232448" in results["shared memory"].reason
    assert (row.tried, row.infeasible, row.wrong, row.failed) == (15, 4, 1, 8)
    assert row.config["fault"] in ("none", "prints") and row.problem == faults.PROBLEM.project(t.fields)
    assert events[0].kind == "start" and events[-1].kind == "done" and events[-1].done == 15
    assert [e.done for e in events if e.kind == "trial"] == list(range(1, 16))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""  # nothing that a worker printed


def test_the_fastest_right_config_wins_and_is_stored(store):
    t = faults.template(tiles=(16, 256), faults=("none", "wrong"))
    (row,) = go(store, t)
    assert row.config == Config(tile=256, fault="none")  # the wrong ones claim to be a hundred times faster
    assert row.default_ms == pytest.approx(0.5, rel=0.02) and row.speedup == pytest.approx(8, rel=0.05)
    (winner,) = store.winners()
    assert Config.from_key(winner.config) == row.config and winner.default_ms == row.default_ms
    assert not winner.static and winner.tuned_ms == row.tuned_ms
    assert latest(store, t)[row.config].protocol["phase"] == "race"


def test_the_default_is_measured_first_and_stays_where_nothing_beats_it(store):
    t = faults.template(tiles=(16, 32))
    (row,) = go(store, t)
    assert row.config == Config(tile=32, fault="none") and row.speedup == 1.0
    assert store.measurements(faults.DEVICE, t, faults.PROBLEM)[0].config == row.config


@pytest.mark.parametrize("fault", ["wrong", "segfault"])
def test_without_a_working_default_there_is_no_winner(store, fault):
    t = faults.template(tiles=(32, 64), faults=(fault, "none"))
    (row,) = go(store, t)
    assert row.config is None and row.tuned_ms is None and row.tried == 1 and store.winners() == []


def test_a_second_run_measures_nothing_again(store, monkeypatch, tmp_path):
    t = faults.template(tiles=(16, 256))
    first = go(store, t)
    count = len(store.measurements(faults.DEVICE, t, faults.PROBLEM))
    monkeypatch.setenv("FAULTS_LOG", str(tmp_path / "log"))
    assert go(store, t) == first
    assert len(store.measurements(faults.DEVICE, t, faults.PROBLEM)) == count
    assert not (tmp_path / "log").exists()  # not one worker was started


def test_a_search_that_was_stopped_before_its_race_is_raced_by_the_next_run(store, monkeypatch):
    t = faults.template(tiles=(16, 256))
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(EFFORTS["tiny"], trials=1))
    assert go(store, t)[0].config == t.default(faults.PROBLEM, faults.DEVICE)
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(EFFORTS["tiny"], trials=40))

    def stop(event):
        if event.kind == "race":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(store, t, on_event=stop)
    times = {r.config: r.result.median_ms for r in store.measurements(faults.DEVICE, t, faults.PROBLEM)}
    best = min(times, key=times.__getitem__)
    (row,) = go(store, t)
    assert row.config == best != t.default(faults.PROBLEM, faults.DEVICE)
    count = len(store.measurements(faults.DEVICE, t, faults.PROBLEM))
    assert go(store, t)[0].config == best
    assert len(store.measurements(faults.DEVICE, t, faults.PROBLEM)) == count  # raced once


def test_a_default_that_failed_before_is_tried_again(store):
    t = faults.template(tiles=(32, 64))
    run = store.start_run("earlier")
    store.record(faults.DEVICE, t, faults.PROBLEM, Config(tile=32, fault="none"), Measured("runtime"), run)
    (row,) = go(store, t)
    assert row.config == Config(tile=64, fault="none") and row.failed == 0


def test_interrupting_keeps_what_was_measured_and_the_next_run_goes_on(store, monkeypatch, tmp_path):
    log = tmp_path / "log"
    monkeypatch.setenv("FAULTS_LOG", str(log))
    t = faults.template(tiles=(8, 2048))

    def interrupt(event):
        if event.kind == "trial" and event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(store, t, on_event=interrupt)
    before = latest(store, t)
    assert len(before) == 4 and store.winners() == []
    pids = {int(line.split()[-1]) for line in log.read_text().splitlines()}
    assert pids and all(killed(pid) for pid in pids)
    events = []
    (row,) = go(store, t, on_event=events.append)
    assert row.config == Config(tile=2048, fault="none") and row.tried == 9
    assert sum(e.kind == "trial" for e in events) == 5 and "4 of 9" in events[0].message
    after = store.measurements(faults.DEVICE, t, faults.PROBLEM)
    searched = [r.config for r in after if r.result.protocol.get("phase") != "race"]
    assert len(searched) == len(set(searched)) == 9


def test_an_interrupt_while_a_candidate_hangs_ends_at_once(store, monkeypatch):
    from sparsek_tune.tune.bench import Bench

    real, interrupted = Bench.measure, []

    def impatient(self, spec, config, *rest):
        if config["fault"] != "hang":
            return real(self, spec, config, *rest)
        interrupted.append(time.monotonic())
        timer = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        try:
            return real(self, spec, config, *rest)
        finally:
            timer.cancel()  # should the call return before

    monkeypatch.setattr(Bench, "measure", impatient)
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, timeout=60.0))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    try:
        with pytest.raises(KeyboardInterrupt):
            go(store, faults.template(tiles=(32, 32), faults=("none", "hang")))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - interrupted[0] < 10


@pytest.fixture
def companions(monkeypatch):
    """By template, what stood beside it in its last race."""
    from sparsek_tune.tune.bench import Bench

    seen, real = {}, Bench.race

    def spy(self, spec, *rest):
        seen[spec.template] = dict(spec.companions)
        return real(self, spec, *rest)

    monkeypatch.setattr(Bench, "race", spy)
    return seen


def test_templates_follow_each_other_with_the_winners_before_them(store, companions):
    one, two = faults.template("one", fields=("n",)), faults.template("two", fields=("n", "d"))
    other = faults.PROBLEM._replace(d=128)
    rows = go(store, one, two, problems=[faults.PROBLEM, other])
    assert [r.template for r in rows] == ["one", "two", "two"]  # one does not depend on d
    best, default = Config(tile=128, fault="none"), Config(tile=32, fault="none")
    assert companions["one"] == {"one": default, "two": default}
    assert companions["two"] == {"one": best, "two": default}


def test_named_kernels_alone_are_tuned_beside_what_is_stored_of_the_others(store, companions):
    one, two = faults.template("one", fields=("n",)), faults.template("two")
    assert [r.template for r in go(store, one, two, kernels=["one"])] == ["one"]
    assert [r.template for r in go(store, one, two, kernels=["two"])] == ["two"]
    assert companions["two"]["one"] == Config(tile=128, fault="none")  # of the first run's race


def test_a_search_begins_with_what_won_nearby(store, monkeypatch):
    t = faults.template(tiles=(16, 2048))
    (row,) = go(store, t)
    best = Config(tile=2048, fault="none")
    assert row.config == best
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, trials=2))
    (row,) = go(store, t, problems=[faults.PROBLEM._replace(n=2048)])
    assert row.tried == 2 and row.config == best


def test_a_spent_budget_ends_the_run_with_what_there_is(store):
    t = faults.template(tiles=(8, 2048), faults=("none", "hang"))
    problems = [faults.PROBLEM, faults.PROBLEM._replace(n=2048), faults.PROBLEM._replace(n=4096)]
    events, start = [], time.monotonic()
    rows = go(store, t, problems=problems, budget=4.0, on_event=events.append)
    assert time.monotonic() - start < 4.0 + TINY.timeout + 3
    assert 1 <= len(rows) <= 3 and rows[0].config is not None and rows[0].tried < 18
    assert len(rows) == 3 or events[-1].kind == "note"


def test_a_config_that_breaks_the_race_is_dropped(store, monkeypatch):
    from sparsek_tune.tune.bench import Bench
    from sparsek_tune.tune.channel import WorkerDied

    real, broken = Bench.race, Config(tile=128, fault="none")

    def race(self, spec, configs, *rest):
        if broken in configs:
            raise WorkerDied("gone")
        return real(self, spec, configs, *rest)

    monkeypatch.setattr(Bench, "race", race)
    t = faults.template(tiles=(16, 128))
    (row,) = go(store, t)
    assert row.config == Config(tile=64, fault="none") and row.failed == 1
    assert latest(store, t)[broken].status == "runtime"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"effort": "heroic"}, "effort must be one of quick, default, full.*'heroic'"),
        ({"budget": 0.0}, r"budget must be above 0 seconds and finite, but is 0\.0"),
        ({"budget": float("nan")}, "finite, but is nan"),
        ({"budget": float("inf")}, "finite, but is inf"),
        ({"kernels": ["fake", "dv", "dk"]}, "kernels must be of fake, but names dk, dv"),
        ({"target": "cuda:1"}, "target must be one of"),
    ],
)
def test_bad_arguments_name_themselves(store, options, words):
    with pytest.raises(ValueError, match=words):
        go(store, faults.template(), **options)


def test_the_run_is_noted_as_it_ended(store, monkeypatch):
    outcomes = []
    monkeypatch.setattr(Store, "finish_run", lambda self, run, outcome="done": outcomes.append(outcome))
    go(store, faults.template(tiles=(32, 32)))
    with pytest.raises(KeyboardInterrupt):
        go(store, faults.template(tiles=(64, 64), fields=("d",)), on_event=interrupt)
    assert outcomes == ["done", "interrupted"]


def interrupt(event):
    raise KeyboardInterrupt


def test_no_process_outlives_a_run(store, monkeypatch, tmp_path):
    log = tmp_path / "log"
    monkeypatch.setenv("FAULTS_LOG", str(log))
    go(store, faults.template(tiles=(32, 64), faults=("none", "hang")))
    pids = {int(line.split()[-1]) for line in log.read_text().splitlines()}
    assert len(pids) >= 3 and os.getpid() not in pids and all(killed(pid) for pid in pids)


@pytest.fixture
def submitted(monkeypatch):
    """What was given to the compile pool, in order: (template, config, part, early)."""
    seen, real = [], CompilePool.submit

    def spy(self, spec, config, part="length", *, early=False):
        seen.append((spec.template, config, part, early))
        return real(self, spec, config, part, early=early)

    monkeypatch.setattr(CompilePool, "submit", spy)
    return seen


def test_what_searches_begin_with_is_compiled_first(store, submitted):
    one, two = faults.template("one", tiles=(16, 1024)), faults.template("two", tiles=(16, 1024))
    go(store, one, two)
    default, parts = Config(tile=32, fault="none"), ("setup", "length", "cases")
    waited_for = [(name, config, part) for name, config, part, early in submitted if not early]
    assert waited_for[:6] == [(name, default, part) for name in ("one", "two") for part in parts]


def test_what_a_run_begins_with_is_compiled_while_the_studies_are_made(store, monkeypatch):
    from sparsek_tune.tune.studies import Studies

    seen, before, submit, of = [], [], CompilePool.submit, Studies.of

    def spy(self, spec, config, part="length", *, early=False):
        seen.append((spec.template, spec.companions["one"]["tile"], config["tile"], part, early))
        return submit(self, spec, config, part, early=early)

    monkeypatch.setattr(CompilePool, "submit", spy)
    monkeypatch.setattr(Studies, "of", lambda *a: before.append(list(seen)) or of(*a))

    def expected(*templates, **options):
        seen.clear()
        go(store, *templates, **options)
        return before[-1]

    parts = ("setup", "length", "cases")
    one, two, three = (faults.template(name, tiles=(16, 64)) for name in ("one", "two", "three"))
    bad = faults.template("bad", tiles=(32, 32), faults=("wrong",))
    assert expected(one) == [("one", 32, 32, part, True) for part in parts]
    assert expected(one, two) == [("two", 64, 32, part, True) for part in parts]  # that of one is known
    for _ in ("new", "failed"):
        assert expected(one, two, three, bad, kernels=["bad"]) == [("bad", 64, 32, part, True) for part in parts]


def test_what_a_run_has_claimed_is_free_again_only_when_its_processes_are_gone(store, monkeypatch, tmp_path):
    from sparsek_tune.tune.studies import Studies

    log, seen, real = tmp_path / "log", [], Studies.close
    monkeypatch.setenv("FAULTS_LOG", str(log))

    def close(self):
        seen.extend(killed(int(line.split()[-1])) for line in log.read_text().splitlines())
        real(self)

    monkeypatch.setattr(Studies, "close", close)
    with pytest.raises(KeyboardInterrupt):
        go(store, faults.template(tiles=(16, 64)), on_event=lambda e: interrupt(e) if e.kind == "trial" else None)
    assert len(seen) > 1 and all(seen)


def test_what_a_search_proposes_before_it_has_results_is_compiled_by_then(store, submitted, monkeypatch):
    from sparsek_tune.tune.bench import Bench

    judged, real, count = [], Bench.verify, 5
    monkeypatch.setattr(search, "OPENING", count)
    monkeypatch.setattr(Bench, "verify", lambda *a: judged.append(len(submitted)) or real(*a))
    one, two = faults.template("one", tiles=(16, 1024)), faults.template("two", tiles=(16, 1024))
    go(store, one, two, jobs=4)
    first, before = submitted[:6], submitted[6 : judged[0]]  # by when the first default is judged
    assert all(early and config["tile"] == 32 for _, config, _, early in first)
    for name in ("one", "two"):
        wanted = [config for template, config, part, _ in submitted if (template, part) == (name, "length")]
        opening = list(dict.fromkeys(wanted))[: 1 + count]
        assert [c for t, c, part, _ in before if (t, part) == (name, "length")] == opening and len(opening) == 1 + count
    assert all(early == (config != opening[0]) for _, config, _, early in before)
    ahead = [template for template, _, _, early in before if early]
    assert ahead == ["one"] * count + ["two"] * count


def test_no_more_is_compiled_ahead_than_is_in_flight(store, submitted, monkeypatch):
    monkeypatch.setattr(search, "WAITING", 1)
    go(store, faults.template("one"), faults.template("two", tiles=(16, 1024)), jobs=1)
    ahead = {c for t, c, part, early in submitted if early and (t, part) == ("two", "length") and c["tile"] != 32}
    assert len(ahead) == 2


def test_what_was_to_be_compiled_beside_another_config_is_not_any_more(store, gate, monkeypatch):
    futures: dict = {}
    real = CompilePool.submit

    def spy(self, spec, config, part="length", *, early=False):
        future = real(self, spec, config, part, early=early)
        if (spec.template, part) == ("two", "length") and early and config["tile"] != 32:
            futures.setdefault(spec.companions["one"]["tile"], []).append(future)
        return future

    monkeypatch.setattr(CompilePool, "submit", spy)
    monkeypatch.setattr(search, "OPENING", 4)
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, trials=5, timeout=60.0))
    two = faults.template("two", tiles=(8, 1024), faults=("gated length",))
    one = faults.template("one", tiles=(16, 128))
    go(store, one, two, on_event=lambda event: event.kind == "race" and gate.touch(), jobs=3)
    cancelled = {tile: [f.cancelled() for f in found] for tile, found in futures.items()}
    assert any(cancelled[32]) and not any(cancelled[128]) and len(set(futures[128])) == 4


def test_compilers_without_work_prepare_the_end_of_a_search_and_the_next_one(store, submitted, monkeypatch):
    """Finalists are compiled for the small problems, and what comes next beside the best so far, before the race."""
    from sparsek_tune.tune.bench import Bench

    before: list = []
    real = Bench.race

    def race(self, *arguments):
        before.append(list(submitted))
        return real(self, *arguments)

    monkeypatch.setattr(Bench, "race", race)
    beside, compile_default = [], search.Search.compile_default

    def spy(self, spec, **options):
        if spec.template == "two" and not before:
            beside.append(spec.companions["one"])
        return compile_default(self, spec, **options)

    monkeypatch.setattr(search.Search, "compile_default", spy)
    one, two = faults.template("one", tiles=(16, 128)), faults.template("two", tiles=(16, 128))
    go(store, one, two)
    best = Config(tile=128, fault="none")
    cases = [(c, early) for t, c, part, early in before[0] if (t, part) == ("one", "cases") and c["tile"] != 32]
    assert cases[-1] == (best, False) and all(early for config, early in cases[:-1])
    assert len(cases) > 1 and cases[-2] == (best, True)
    assert beside[0] == Config(tile=32, fault="none") and beside[-1] == best


def test_what_is_shipped_is_tried_and_stands_beside_others(store, companions, monkeypatch):
    one, two = faults.template("one", tiles=(16, 2048)), faults.template("two")
    go(store, one, kernels=["one"])
    entries = store.winners()
    monkeypatch.setattr(reader, "load_shipped", lambda kind, cc: Winners(tuple(entries)))
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, trials=2))
    with Store(store.path.with_name("empty.db")) as empty:
        one_row, _ = go(empty, one, two, problems=[faults.PROBLEM._replace(n=2048)])
        assert one_row.tried == 2 and one_row.config == Config(tile=2048, fault="none")
        companions.clear()
    with Store(store.path.with_name("another.db")) as another:
        go(another, one, two, kernels=["two"])
    assert companions["two"]["one"] == Config(tile=2048, fault="none")


def test_what_no_gpu_has_run_does_not_stand_beside_a_gpus_kernels(store, companions, monkeypatch):
    one, two = faults.template("one"), faults.template("two")
    go(store, one, kernels=["one"])
    entries = tuple(e._replace(static=True) for e in store.winners())
    monkeypatch.setattr(reader, "load_shipped", lambda kind, cc: Winners(entries))
    with Store(store.path.with_name("empty.db")) as empty:
        go(empty, one, two, kernels=["two"])
    assert companions["two"]["one"] == Config(tile=32, fault="none")


def test_a_config_that_would_not_be_compiled_in_time_is_not_asked_for(store, monkeypatch):
    """The default takes long to compile: no time is left for what takes as long again and is not compiled yet."""
    monkeypatch.setattr(search, "OPENING", 2)
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, seconds=6.0))
    real = search.settled
    monkeypatch.setattr(search, "settled", lambda parts: real(parts)._replace(seconds=3600.0))
    (row,) = go(store, faults.template())
    assert row.tried == 3


def test_what_won_too_far_away_to_be_served_is_tried_where_it_fits_and_stands_beside_nothing(
    store, companions, monkeypatch, tmp_path
):
    def check(config, problem, device):
        return "too large" if config["tile"] == 2048 and problem.n == 2048 else None

    one = faults.template("one", tiles=(16, 2048), fields=("n",), check=check)
    go(store, one, problems=[faults.PROBLEM._replace(n=1 << 17)])
    (entry,) = store.winners()
    default, second, best = (Config(tile=tile, fault="none") for tile in (32, 1024, 2048))
    assert entry.config == best.key
    further = entry._replace(config=second.key, problem=entry.problem._replace(n=1 << 18))
    monkeypatch.setattr(reader, "load_shipped", lambda kind, cc: Winners((further, entry)))
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, trials=2))
    for n, winner in ((1024, best), (2048, second)):
        problem = faults.PROBLEM._replace(n=n)
        with Store(tmp_path / f"{n}.db") as empty:
            go(empty, one, faults.template("two"), kernels=["two"], problems=[problem])
            assert companions["two"]["one"] == default
            (row,) = go(empty, one, problems=[problem])
        assert row.tried == 2 and row.config == winner


def test_what_another_gpu_won_since_does_not_stand_for_this_ones_race(store):
    t = faults.template(tiles=(16, 256))

    def stop(event):
        if event.kind == "race":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(store, t, on_event=stop)
    other = dataclasses.replace(faults.DEVICE, name="another GPU")
    tune([faults.PROBLEM], other, store, effort="tiny", factory=faults.FACTORY, templates={t.name: t})
    go(store, t)
    assert {entry.device for entry in store.winners()} == {faults.DEVICE, other}


def only_the_default_has_no_fault(config, problem, device):
    return None if (config["tile"] == 32) == (config["fault"] in ("none", "wrong")) else "neither"


def test_a_search_goes_on_while_what_won_before_is_compiled_for_the_small_problems(
    store, companions, gate, monkeypatch
):
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, timeout=60.0))
    events: list = []

    def see(event):
        events.append(event)
        if (event.kind, event.template) == ("race", "two"):
            gate.touch()

    one = faults.template("one", tiles=(32, 128), faults=("none", "gated cases"), check=only_the_default_has_no_fault)
    rows = go(store, one, faults.template("two", tiles=(32, 64)), on_event=see, jobs=3)
    order = [(e.kind, e.template) for e in events if e.kind in ("start", "race", "done")]
    searches = [(kind, name) for name in ("one", "two") for kind in ("start", "race")]
    assert order[:4] == searches and {*order[4:]} == {("done", "one"), ("done", "two")}
    best = Config(tile=128, fault="gated cases")
    assert [row.template for row in rows] == ["one", "two"] and rows[0].config == best == companions["two"]["one"]


def test_what_won_is_served_while_the_next_search_goes_on(store, gate, monkeypatch):
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, timeout=60.0))
    cases, served, real = [], [], CompilePool.submit

    def spy(self, spec, config, part="length", *, early=False):
        future = real(self, spec, config, part, early=early)
        if (spec.template, config["tile"], part) == ("one", 128, "cases"):
            cases.append(future)
        return future

    def see(event):
        if (event.kind, event.template) == ("trial", "two"):
            gate.touch()
            assert cases[-1].result().status == "ok"
        if (event.kind, event.template) == ("race", "two"):
            served.extend(store.winners())

    monkeypatch.setattr(CompilePool, "submit", spy)
    one = faults.template("one", tiles=(32, 128), faults=("none", "gated cases"), check=only_the_default_has_no_fault)
    go(store, one, faults.template("two", tiles=(32, 64)), on_event=see, jobs=3)
    assert [(e.template, e.config) for e in served] == [("one", Config(tile=128, fault="gated cases").key)]


def test_a_gpu_that_is_lost_when_a_winner_meets_the_small_problems_is_held_against_nothing(
    store, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAULTS_LOST", str(tmp_path / "lost"))
    one = faults.template("one", tiles=(16, 128))
    with pytest.raises(MachineError, match="no CUDA-capable"):
        go(store, one, on_event=lambda event: event.kind == "race" and (tmp_path / "lost").touch())
    assert {result.status for result in latest(store, one).values()} == {"ok"}
    (tmp_path / "lost").unlink()
    (row,) = go(store, one)
    assert row.config == Config(tile=128, fault="none") and row.tried == len(latest(store, one)) == 4


def test_a_default_that_fails_takes_what_was_to_be_tried_after_it_along(store, gate, monkeypatch):
    futures, real = [], CompilePool.submit

    def spy(self, spec, config, part="length", *, early=False):
        future = real(self, spec, config, part, early=early)
        futures.extend([future] if early and config["fault"] != "wrong" else [])
        return future

    def see(event):
        if event.kind == "done":
            assert futures and all(future.cancelled() for future in futures)

    monkeypatch.setattr(CompilePool, "submit", spy)
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, timeout=60.0))
    bad = faults.template(tiles=(16, 128), faults=("wrong", "gated length"), check=only_the_default_has_no_fault)
    (row,) = go(store, bad, on_event=see, jobs=3)
    assert row.config is None


def test_who_helps_stands_beside_what_the_driver_does(store, monkeypatch):
    one, two = faults.template("one"), faults.template("two", tiles=(16, 1024))
    monkeypatch.setitem(EFFORTS, "tiny", dataclasses.replace(TINY, trials=2))
    go(store, one, two)
    seen, real = [], search.Search._explore
    monkeypatch.setattr(search.Search, "_explore", lambda self, *a, **k: seen.append(self.spec) or real(self, *a, **k))
    companions = {"one": Config(tile=16, fault="none"), "two": Config(tile=32, fault="none")}
    templates, about = {"one": one, "two": two}, {"effort": "default", "seed": 0, "until": None}
    number = store.start_run("help")
    with Run(faults.DEVICE, store, number, templates, about, None, faults.FACTORY, 2) as run:
        assert run._help(Searching("two", faults.PROBLEM, time.time() + 60, companions))
    assert [spec.companions for spec in seen] == [companions]


@pytest.mark.parametrize(("fault", "status"), [("wrong in cases", "wrong"), ("kill in cases", "runtime")])
def test_what_won_and_fails_the_small_problems_then_is_recorded_and_the_race_held_again(store, fault, status):
    events: list = []
    one = faults.template("one", tiles=(32, 128), faults=("none", fault))
    row, other = go(store, one, faults.template("two", tiles=(32, 64)), on_event=events.append)
    assert row.config == Config(tile=128, fault="none") and other.config == Config(tile=64, fault="none")
    results = latest(store, one)
    assert results[Config(tile=128, fault=fault)].status == status
    assert len([e for e in events if (e.kind, e.template) == ("race", "one")]) == 2
    (served,) = [e for e in store.winners() if e.template == "one"]
    assert served.config == row.config.key


def test_finalists_are_verified_before_the_race_unless_this_run_has_done_so(store, monkeypatch):
    from sparsek_tune.tune.bench import Bench

    verified, real = [], Bench.verify
    monkeypatch.setattr(Bench, "verify", lambda *a: verified.append(a[2]) or real(*a))
    t = faults.template(tiles=(16, 64))
    with pytest.raises(KeyboardInterrupt):
        go(store, t, on_event=lambda event: interrupt(event) if event.kind == "race" else None)
    assert sorted(config["tile"] for config in verified) == [16, 32, 64]  # once each
    del verified[:]
    go(store, t)
    assert verified == [Config(tile=64, fault="none"), Config(tile=16, fault="none")]


def test_finalists_that_fail_the_small_problems_are_recorded_and_do_not_win(store):
    t = faults.template(tiles=(16, 64), faults=("none", "compile error of cases"))
    (row,) = go(store, t)
    assert row.config["fault"] == "none" and row.infeasible == 3
    assert {r.status for c, r in latest(store, t).items() if c["fault"] != "none"} == {"compile"}


def test_a_race_that_breaks_for_many_but_for_no_two_is_held_with_the_fastest(store, monkeypatch):
    from sparsek_tune.tune.channel import WorkerTimeout

    once = judge._race

    def race(search, configs):
        if len(configs) > 2:
            raise WorkerTimeout("too many")
        return once(search, configs)

    monkeypatch.setattr(judge, "_race", race)
    (row,) = go(store, faults.template(tiles=(16, 256)))
    assert row.config == Config(tile=256, fault="none") and row.speedup > 2


def test_the_best_time_is_that_of_a_config_that_still_counts(store):
    from sparsek_tune.tune.record import Ledger, failed

    t, (fast, slow) = faults.template(tiles=(16, 32)), (Config(tile=tile, fault="none") for tile in (16, 32))
    ledger = Ledger(store, faults.DEVICE, t, faults.PROBLEM, store.start_run("test"))
    ledger.add(slow, Measured("ok", 2.0, 2.0, 2.0, 9, protocol={}))
    ledger.add(fast, Measured("ok", 1.0, 1.0, 1.0, 9, protocol={}))
    assert ledger.best_ms == 1.0
    ledger.add(fast, failed("wrong", "out", {}))
    assert ledger.best_ms == 2.0 and ledger.ranking() == [slow]
