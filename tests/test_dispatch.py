"""Which config serves a problem: grade by grade, and what the hot path costs and must not do."""

import json
import random
import subprocess
import sys
import threading
import timeit
import warnings
from dataclasses import replace

import pytest
import torch

from sparsek_tune import dispatch
from sparsek_tune.db import reader
from sparsek_tune.db.reader import Entry
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Config, Cost, Param, Pow2, Template
from sparsek_tune.problem import Device, Problem, target_device

GPU = Device("cuda", 90, "GPU A", 132, 232448, 50 << 20, 80 << 30, "550.1", "12.8", "3.6.0", "2.13.0")
PROBLEM = Problem.of("bf16", 128, 4, "kv", 1024, 512, 16384, 8)
DEFAULT = Config(BLOCK=16, WARPS=1)
TUNED = Config(BLOCK=64, WARPS=4)
OTHER = Config(BLOCK=32, WARPS=4)


def check(config, problem, device):
    return "BLOCK 128 is above the length" if config["BLOCK"] == 128 and problem.n <= 64 else None


def template(name="forward", fields=frozenset(Problem._fields), sources=(__file__,)):
    space = (Param("BLOCK", Pow2(16, 128)), Param("WARPS", Pow2(1, 8)))
    return Template(name, fields, space, lambda p, d: DEFAULT, check, lambda c, p: Cost(1.0, 1.0), sources)


FORWARD = template()


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache directory, no memory of earlier tests, one kernel, one (invented) GPU."""
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(tmp_path / "cache.db"))
    monkeypatch.setattr(dispatch, "_warned", False)
    monkeypatch.setattr(dispatch, "_templates", lambda: {"forward": FORWARD})
    monkeypatch.setattr(dispatch, "current_device", lambda index: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(reader, "SHIPPED", tmp_path / "shipped")
    dispatch.clear()
    yield
    dispatch.clear()


def tune(config=TUNED, problem=PROBLEM, device=GPU, kernel=FORWARD, status="ok"):
    """Store ``config`` as the winner of ``problem``."""
    with Store() as store:
        result = Measured(status, 0.2 if status == "ok" else None)
        store.set_winner(store.record(device, kernel, problem, config, result, store.start_run("test")), 0.3, 0.2)


def ship(directory, config=TUNED, problem=PROBLEM, device=GPU, **change):
    entry = Entry("forward", FORWARD.source_hash, device, problem, config.key, 0.3, 0.2, False, "2026-01-01")
    directory.mkdir(exist_ok=True)
    path = directory / f"{len(list(directory.iterdir()))}.json"
    path.write_text(json.dumps(reader.document([entry._replace(**change)])))


def resolve(problem=PROBLEM, device=GPU, kernel=FORWARD):
    return dispatch.resolve(problem, device, templates={"forward": kernel})["forward"]


# --- the grades


def test_exact_is_the_same_problem_on_the_same_gpu():
    tune()
    found = resolve()
    assert (found.config, found.grade, found.distance) == (TUNED, "exact", 0.0)
    assert found.reason == "measured on GPU A, for this very problem"


def test_exact_notes_other_software():
    tune()
    found = resolve(device=replace(GPU, driver="560.2", triton="3.7.0"))
    assert found.grade == "exact"
    assert found.reason.endswith("with driver 550.1 instead of 560.2, triton 3.6.0 instead of 3.7.0")


def test_exact_ignores_the_fields_that_the_kernel_does_not_depend_on():
    kernel = template(fields=frozenset({"n", "rows"}))
    tune(kernel=kernel)
    other = PROBLEM._replace(dtype="fp16", d=64, g=1, gate="none", k=7, w=0)
    assert resolve(other, kernel=kernel).grade == "exact"
    assert resolve(other._replace(n=8192), kernel=kernel).grade == "near"


@pytest.mark.parametrize(
    ("change", "distance"),
    [
        ({"n": 4 * PROBLEM.n}, 2.0),
        ({"n": PROBLEM.n // 4}, 2.0),
        ({"rows": 32}, 2.0),
        ({"k": 2048}, 1.0),
        ({"k": 724}, pytest.approx(0.5, abs=1e-3)),
        ({"w": 256}, 1.0),
        ({"n": 2 * PROBLEM.n, "rows": 4, "k": 512}, 3.0),
    ],
)
def test_near_is_a_bounded_distance(change, distance):
    tune()
    found = resolve(PROBLEM._replace(**change))
    assert (found.config, found.grade, found.distance) == (TUNED, "near", distance)
    for name, value in change.items():
        assert f"{name}={getattr(PROBLEM, name)} instead of {value}" in found.reason


@pytest.mark.parametrize("change", [{"n": 8 * PROBLEM.n}, {"rows": 64}, {"k": 2049}, {"w": 1025}, {"w": 0}])
def test_too_far_away_is_the_default(change):
    tune()
    found = resolve(PROBLEM._replace(**change))
    assert (found.config, found.grade) == (DEFAULT, "default")
    assert f"1 stored config is too far away in {next(iter(change))}" in found.reason


def test_a_problem_without_a_window_is_far_from_all_with_one():
    tune(problem=PROBLEM._replace(w=0))
    assert resolve(PROBLEM._replace(w=1)).grade == "default"
    assert resolve(PROBLEM._replace(w=0)).grade == "exact"


@pytest.mark.parametrize("change", [{"name": "GPU B"}, {"sm_count": 114}])
def test_another_gpu_of_the_same_capability_is_near_at_best(change):
    tune(device=replace(GPU, **change))
    found = resolve()
    assert (found.config, found.grade, found.distance) == (TUNED, "near", dispatch.OTHER_GPU)
    assert "not on GPU A" in found.reason


@pytest.mark.parametrize("change", [{"dtype": "fp16"}, {"d": 64}, {"g": 8}, {"gate": "v"}])
def test_a_hard_field_that_differs_is_the_default(change):
    tune()
    found = resolve(PROBLEM._replace(**change))
    assert (found.config, found.grade) == (DEFAULT, "default")
    assert f"1 stored config is for another {next(iter(change))}" in found.reason


def test_another_compute_capability_is_the_default(tmp_path):
    tune()
    ship(tmp_path / "shipped")
    found = resolve(device=replace(GPU, cc=80))
    assert (found.config, found.grade) == (DEFAULT, "default")
    assert "no winner for cuda:80" in found.reason


def test_another_version_of_the_source_is_the_default(tmp_path):
    tune()
    source = tmp_path / "kernel.py"
    source.write_text("changed")
    found = resolve(kernel=template(sources=(str(source),)))
    assert (found.config, found.grade) == (DEFAULT, "default")
    assert "1 stored config is from another version of the kernel's source" in found.reason


def test_another_kernel_is_the_default():
    tune()
    plan = dispatch.resolve(PROBLEM, GPU, templates={"forward": FORWARD, "dq": template("dq")})
    assert [(name, r.grade) for name, r in plan.items()] == [("forward", "exact"), ("dq", "default")]
    assert plan.configs == {"forward": TUNED, "dq": DEFAULT}
    assert "none is of this kernel" in plan["dq"].reason


def test_nothing_stored_is_the_default():
    found = resolve()
    assert (found.config, found.grade) == (DEFAULT, "default")
    assert "there is no database" in found.reason
    assert "sparsek-tune run" in found.reason


@pytest.mark.parametrize("change", [{}, {"n": 2 * PROBLEM.n}])
def test_shipped_configs_serve_what_is_not_tuned(tmp_path, change):
    ship(tmp_path / "shipped")
    found = resolve(PROBLEM._replace(**change))
    assert (found.config, found.grade) == (TUNED, "shipped")
    assert "shipped with the package, measured on GPU A" in found.reason


def test_a_static_config_serves_every_gpu_of_its_target():
    tune(device=target_device("cuda:90"), status="static")
    for device in (GPU, target_device("cuda:90")):
        found = resolve(device=device)
        assert (found.config, found.grade, found.distance) == (TUNED, "static", 0.0)
        assert found.reason.startswith("ranked by the cost model for target cuda:90")


def test_measured_outranks_shipped_outranks_static(tmp_path):
    tune(DEFAULT, device=target_device("cuda:90"), status="static")
    assert resolve().grade == "static"
    ship(tmp_path / "shipped", OTHER, PROBLEM._replace(n=4 * PROBLEM.n))
    assert (resolve().grade, resolve().config) == ("shipped", OTHER)
    tune(TUNED, PROBLEM._replace(n=4 * PROBLEM.n, rows=32))
    assert (resolve().grade, resolve().config) == ("near", TUNED)
    tune(OTHER)
    assert (resolve().grade, resolve().config) == ("exact", OTHER)


# --- what is checked before a config is used


def test_a_config_outside_the_search_space_is_passed_over():
    tune(OTHER, PROBLEM._replace(n=2 * PROBLEM.n))
    tune(Config(BLOCK=48, WARPS=4))
    assert (resolve().grade, resolve().config) == ("near", OTHER)
    tune(Config(BLOCK=64), PROBLEM._replace(n=2 * PROBLEM.n))
    assert resolve().grade == "default"
    assert "2 stored configs are not in the kernel's search space" in resolve().reason


def test_an_infeasible_config_is_passed_over():
    short = PROBLEM._replace(n=64)
    tune(Config(BLOCK=128, WARPS=4), short._replace(n=128))
    found = resolve(short)
    assert (found.config, found.grade) == (DEFAULT, "default")
    assert "infeasible here (BLOCK 128 is above the length)" in found.reason
    tune(OTHER, short._replace(n=256))
    assert resolve(short).config == OTHER, "the next best serves"


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3"])
def test_an_unreadable_config_is_passed_over(text):
    entry = Entry("forward", FORWARD.source_hash, GPU, PROBLEM, text, None, None, False, "2026")
    found = dispatch._choose(FORWARD, PROBLEM, GPU, reader.Winners((entry,)))
    assert found.grade == "default"
    assert "not" in found.reason


# --- ties


def entry(config, **change):
    made = Entry("forward", FORWARD.source_hash, GPU, PROBLEM, config.key, 0.3, 0.2, False, "2026-01-01T00:00:00")
    return made._replace(**change)


@pytest.mark.parametrize(
    ("loser", "winner"),
    [
        ({"problem": PROBLEM._replace(n=4 * PROBLEM.n)}, {"problem": PROBLEM._replace(n=PROBLEM.n // 2)}),
        ({"device": replace(GPU, driver="1", torch="2.11")}, {"device": replace(GPU, driver="1")}),
        ({"created_at": "2026-01-01T00:00:00"}, {"created_at": "2026-01-02T00:00:00"}),
        ({"device": replace(GPU, name="B"), "created_at": "2027"}, {"problem": PROBLEM._replace(k=725)}),
    ],
)
def test_the_closer_then_the_more_alike_then_the_newer_serves(loser, winner):
    entries = (entry(OTHER, **loser), entry(TUNED, **winner))
    for order in (entries, entries[::-1]):
        assert dispatch._choose(FORWARD, PROBLEM, GPU, reader.Winners(order)).config == TUNED


def test_full_ties_do_not_depend_on_the_order():
    entries = (entry(TUNED), entry(OTHER))
    found = {dispatch._choose(FORWARD, PROBLEM, GPU, reader.Winners(o)).config for o in (entries, entries[::-1])}
    assert found == {OTHER}


# --- why


def test_every_stored_config_is_explained_best_first(tmp_path):
    tune(OTHER, replace_n(4096))
    tune(TUNED)
    tune(Config(BLOCK=16, WARPS=2), replace_n(1 << 20))
    tune(Config(BLOCK=16, WARPS=4), PROBLEM._replace(d=64))
    tune(Config(BLOCK=16, WARPS=8), device=replace(GPU, cc=80, name="GPU C"))
    tune(Config(BLOCK=7, WARPS=8), device=replace(GPU, name="GPU B"))
    tune(Config(BLOCK=32, WARPS=1), kernel=template(sources=(json.__file__,)))
    tune(Config(BLOCK=32, WARPS=8), kernel=template("dq"))
    ship(reader.SHIPPED, Config(BLOCK=64, WARPS=1))
    found = dispatch.explain(PROBLEM, GPU, templates={"forward": FORWARD})["forward"]
    said = [(c.grade, c.distance, c.refused) for c in found if not c.refused]
    assert said == [("exact", 0.0, ""), ("near", 2.0, ""), ("shipped", 0.0, "")]
    assert found[0].entry.config == resolve().config.key
    refused = {c.entry.config: (c.distance, c.refused) for c in found if c.refused}
    assert refused == {
        '{"BLOCK":16,"WARPS":2}': (6.0, "too far away in n"),
        '{"BLOCK":16,"WARPS":4}': (float("inf"), "for another d"),
        '{"BLOCK":16,"WARPS":8}': (float("inf"), "for another compute capability"),
        '{"BLOCK":7,"WARPS":8}': (1.0, "not in the kernel's search space"),
        '{"BLOCK":32,"WARPS":1}': (float("inf"), "from another version of the kernel's source"),
    }


def test_an_entry_that_makes_no_sense_leaves_the_others(monkeypatch):
    tune(TUNED)
    real = reader.load
    strange = (
        real(None, "cuda", 90).entries[0]._replace(problem=PROBLEM._replace(n="abc"), config='{"BLOCK":32,"WARPS":4}')
    )

    def load(*args):
        found = real(*args)
        return found._replace(entries=(strange, *found.entries))

    monkeypatch.setattr(reader, "load", load)
    assert resolve().config == TUNED
    found = dispatch.explain(PROBLEM, GPU, templates={"forward": FORWARD})["forward"]
    assert [c.refused[:12] for c in found] == ["", "not readable"]


def test_true_is_no_number_of_warps():
    tune(Config(BLOCK=64, WARPS=True))
    assert resolve().grade == "default"


@pytest.mark.parametrize("seed", range(8))
def test_what_is_explained_first_is_what_serves(seed):
    g = random.Random(seed)
    for _ in range(6):
        config = Config(BLOCK=g.choice([16, 32, 64, 128, 256]), WARPS=g.choice([1, 2, 4]))
        device = replace(GPU, name=g.choice(["GPU A", "GPU B"]), driver=g.choice(["550.1", "560.0"]))
        problem = PROBLEM._replace(n=g.choice([4096, 16384, 65536, 1 << 20]), k=g.choice([512, 1024]))
        tune(config, problem, device, status=g.choice(["ok", "static"]))
    first, served = dispatch.explain(PROBLEM, GPU, templates={"forward": FORWARD})["forward"][0], resolve()
    if served.grade == "default":
        assert first.refused
    else:
        assert (first.entry.config, first.grade, first.distance) == (served.config.key, served.grade, served.distance)


def replace_n(n):
    return PROBLEM._replace(n=n)


# --- the hot path


def test_configs_reads_the_database_once(monkeypatch):
    tune()
    calls = []
    load = reader.load
    monkeypatch.setattr(reader, "load", lambda *args: calls.append(args) or load(*args))
    assert dispatch.configs(PROBLEM, 0) == {"forward": TUNED}
    assert dispatch.configs(PROBLEM, 0) is dispatch.configs(PROBLEM, 0)
    assert dispatch.configs(PROBLEM._replace(n=64), 0) == {"forward": DEFAULT}
    assert len(calls) == 1
    dispatch.configs(PROBLEM, 1)
    assert len(calls) == 2, "another device may be another GPU"


def test_clear_shows_what_was_tuned_since():
    assert dispatch.configs(PROBLEM, 0) == {"forward": DEFAULT}
    tune()
    assert dispatch.configs(PROBLEM, 0) == {"forward": DEFAULT}
    dispatch.clear()
    assert dispatch.configs(PROBLEM, 0) == {"forward": TUNED}


def test_a_hit_takes_less_than_a_microsecond():
    tune()
    dispatch.configs(PROBLEM, 0)
    calls = 10_000
    # A new tuple each time, as the ops make one: its hash is part of the hit.
    timer = timeit.Timer(
        "configs(problem, 0)", "from sparsek_tune.dispatch import configs", globals={"problem": Problem(*PROBLEM)}
    )
    assert min(timer.repeat(15, calls)) / calls < 1e-6


def test_a_miss_during_capture_serves_defaults_touches_no_file_and_is_forgotten(monkeypatch):
    tune()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "load", lambda *args: pytest.fail("the database was read during capture"))
        patch.setattr(reader, "load_shipped", lambda *args: pytest.fail("a file was read during capture"))
        assert dispatch.configs(PROBLEM, 0) == {"forward": DEFAULT}
        assert dispatch.configs(PROBLEM, 0) == {"forward": DEFAULT}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dispatch.configs(PROBLEM, 0) == {"forward": TUNED}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.configs(PROBLEM, 0) == {"forward": TUNED}, "a hit serves during capture too"


def test_an_unusable_database_means_defaults_and_one_warning(tmp_path):
    (tmp_path / "cache.db").write_bytes(b"not a database" * 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (64, 128, 256):
            assert dispatch.configs(PROBLEM._replace(n=n), 0) == {"forward": DEFAULT}
        dispatch.clear()
        dispatch.configs(PROBLEM, 0)
    assert len(caught) == 1
    assert str(tmp_path / "cache.db") in str(caught[0].message)
    assert "is not a SQLite database" in resolve().reason


def test_an_unusable_database_is_named_beside_the_shipped_config_that_serves(tmp_path):
    (tmp_path / "cache.db").write_bytes(b"not a database" * 100)
    ship(tmp_path / "shipped")
    assert resolve().grade == "shipped"
    assert "is not a SQLite database" in resolve().reason


def test_no_database_is_no_reason_to_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.configs(PROBLEM, 0) == {"forward": DEFAULT}
    assert list(tmp_path.iterdir()) == [], "reading makes no file"


def test_override_forces_configs_for_the_block_on_every_thread(monkeypatch):
    monkeypatch.setattr(dispatch, "_templates", lambda: {"forward": FORWARD, "dq": template("dq")})
    tune()
    plain = dispatch.configs(PROBLEM, 0)
    seen = []
    with dispatch.override({"forward": OTHER}):
        assert dispatch.configs(PROBLEM, 0) == {"forward": OTHER, "dq": DEFAULT}
        with dispatch.override({"dq": TUNED}):
            thread = threading.Thread(target=lambda: seen.append(dispatch.configs(PROBLEM, 0)))
            thread.start()
            thread.join()
        assert dispatch.configs(PROBLEM, 0) == {"forward": OTHER, "dq": DEFAULT}
    assert seen == [{"forward": OTHER, "dq": TUNED}]
    assert dispatch.configs(PROBLEM, 0) == plain == {"forward": TUNED, "dq": DEFAULT}


def test_a_complete_override_needs_neither_gpu_nor_database(monkeypatch):
    monkeypatch.setattr(dispatch, "current_device", lambda index: pytest.fail("a GPU was looked for"))
    with pytest.raises(KeyError), dispatch.override({"forward": OTHER}):
        assert dispatch.configs(PROBLEM, 0) == {"forward": OTHER}
        raise KeyError
    assert dispatch._forced is None, "the override ends with its block, also by an error"


def test_a_plan_is_read_only():
    plan = dispatch.resolve(PROBLEM, GPU)
    assert (list(plan), len(plan), plan.problem, plan.device) == (["forward"], 1, PROBLEM, GPU)
    with pytest.raises(TypeError):
        plan["forward"] = None
    with pytest.raises(AttributeError):
        plan["forward"].grade = "exact"


def test_importing_the_dispatcher_loads_the_standard_library_only():
    code = "import sys, sparsek_tune.dispatch, sparsek_tune.db.reader; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sparsek_tune.dispatch" in loaded
    assert not {"sqlalchemy", "optuna", "click", "torch", "triton", "numpy"} & set(loaded)


def test_resolving_loads_no_sqlalchemy_optuna_or_click(tmp_path):
    tune(kernel=FORWARD)
    code = (
        "import pathlib, sys; from sparsek_tune import dispatch, problem\n"
        "p = problem.Problem.of('bf16', 128, 4, 'kv', 1024, 512, 16384, 8)\n"
        f"plan = dispatch.resolve(p, problem.target_device('cuda:90'), shipped=pathlib.Path({str(tmp_path)!r}))\n"
        "print(*{r.grade for r in plan.values()}, *sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "default"
    assert "sqlite3" in out
    assert not {"sqlalchemy", "optuna", "click"} & set(out)


def test_what_was_recorded_under_an_override_is_not_replayed_after_it():
    before = dispatch.generation
    with dispatch.override({}):
        within = dispatch.generation
        with dispatch.override({}):
            assert dispatch.generation not in (before, within)
            deeper = dispatch.generation
        assert dispatch.generation not in (before, within, deeper)
    assert len({before, within, deeper, dispatch.generation}) == 4


def test_what_was_recorded_before_a_clear_is_not_replayed_after_it():
    before = dispatch.generation
    dispatch.clear()
    assert dispatch.generation != before
