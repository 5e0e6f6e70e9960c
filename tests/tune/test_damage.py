"""The judge against what broken kernels give: every damage by itself, then in the stage, then in a run."""

from __future__ import annotations

import re

import by_reference
import faults
import pytest
import torch
from by_reference import FACTORY, GOOD, PROBLEM, Stage, spec
from damage import MEMORY, TOLERATED, WRONG, Call

from sparsek_tune.db.store import Store
from sparsek_tune.kernel_templates.base import Choice, Config, Cost, Param, Pow2, Template
from sparsek_tune.tune import EFFORTS, sample, types
from sparsek_tune.tune import stages as module
from sparsek_tune.tune.bench import Bench, BenchService
from sparsek_tune.tune.redzone import MemoryCorrupted
from sparsek_tune.tune.stages import make_inputs
from sparsek_tune.tune.tuner import tune
from sparsek_tune.tune.verify import TOLERANCE, compare, expected, reduced


@pytest.fixture(scope="module")
def case():
    """A call of bfloat16 at the length that a GPU's candidates are verified at, and its answer."""
    i = make_inputs(reduced(PROBLEM), "cpu")
    return Call(
        **{n: getattr(i, n) for n in ("dout", "query", "key", "value", "scores", "k", "window", "scale", "gate")}
    ), (expected(i))


def rounded(want):
    """Copies as right kernels give them: what ends in D in bfloat16, the rest in float32 and int32."""

    def one(t):
        dtype = torch.bfloat16 if t.dim() == 4 else torch.float32 if t.is_floating_point() else torch.int32
        return t.to(dtype, copy=True)

    return {name: one(t) for name, t in want.items() if not name.endswith("_inherent")}


def test_there_are_enough():
    assert len(WRONG) >= 25 and {t for t, _ in WRONG.values()} == {"threshold", "forward", "dq", "dkv"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_caught(case, name):
    call, want = case
    got = rounded(want)
    assert compare(got, want, TOLERANCE["bf16"], call.scores) is None
    WRONG[name][1](got, call)
    assert compare(got, want, TOLERANCE["bf16"], call.scores) is not None


@pytest.mark.parametrize("name", TOLERATED)
def test_what_rounding_could_do_goes_through(case, name):
    """What a candidate could be off by, and win: stated, so that nobody takes it for caught."""
    call, want = case
    got = rounded(want)
    TOLERATED[name][1](got, call)
    assert compare(got, want, TOLERANCE["bf16"], call.scores) is None


# --- in the stage


@pytest.fixture(scope="module")
def stages():
    """A prepared stage of each template; the launch functions are stand-ins meanwhile."""
    patch = pytest.MonkeyPatch()
    by_reference.install(patch.setattr)
    made = {}

    def get(template):
        if template not in made:
            made[template] = Stage(spec(template), "measure")
            made[template].prepare()
        return made[template]

    yield get
    patch.undo()


def bad(fault):
    return Config(GOOD | {"fault": fault})


@pytest.mark.parametrize("template", by_reference.NAMES)
def test_right_results_pass_and_leave_no_trace(stages, template):
    stage = stages(template)
    assert stage.verify(GOOD) is None
    assert stage.verify(Config(GOOD | {"tile": 64})) is None
    stage.check()


@pytest.mark.parametrize("name", ["one_head_of_dq_is_not_scaled", "one_segment_is_left_out", "one_count_is_off"])
def test_a_wrong_result_is_told_with_the_scores_that_showed_it(stages, name):
    name = name.replace("_", " ")
    assert stages(WRONG[name][0]).verify(bad(name)).startswith("normal scores, n=461: ")


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_at_the_timed_length_alone_is_caught(stages, name):
    """Against the default config, which is rounded too."""
    template, _ = WRONG[name]
    reason = stages(template).verify(bad(f"late {name}"))
    assert reason is not None and reason.startswith("n=512, against the default config: ")


SAMPLED = {
    "two heads are swapped": "out", "the gate is left out of the logits": "out", "lse is off by a hundredth": "lse",
    "delta is left out": "dq", "one head of dq is not scaled": "dq", "the last row of dq is not written": "dq",
    "one head of the group is left out": "dk", "dv lacks the window": "dv",
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
def test_a_default_that_goes_wrong_at_the_timed_length_alone_is_caught_by_a_sample(monkeypatch, name):
    """What all others are compared with is wrong itself: it must not turn the right ones into wrong ones, and win."""
    by_reference.install(monkeypatch.setattr)
    template, default = WRONG[name][0], bad(f"late {name}")
    stage = Stage(spec(template)._replace(companions={template: default}), "measure")
    reason = stage.verify(default)
    assert reason is not None and reason.startswith(f"n=512, a sample: {SAMPLED[name]}: ")


@pytest.mark.parametrize("late", ["", "late "])
@pytest.mark.parametrize("name", [n for n in MEMORY if n.startswith("writes") and "input" not in n])
def test_a_write_out_of_bounds_is_caught_at_both_lengths(stages, name, late):
    stage = stages(MEMORY[name][0])
    with pytest.raises(MemoryCorrupted, match=r"written (after its end|before its start)"):
        stage.verify(bad(late + name))
    stage.check()  # the redzones are the candidate's own: nothing else is damaged


def test_the_reason_names_the_buffer(stages):
    for name, words in {
        "writes after the end": "^out: written after",
        "writes before the start": "^lse: written before",
        "writes into the next carved buffer": r"^int32\[1024\] made in by_reference.py:\d+: written after",
    }.items():
        with pytest.raises(MemoryCorrupted, match=words):
            stages(MEMORY[name][0]).verify(bad(name))


@pytest.mark.parametrize("late", ["", "late "])
@pytest.mark.parametrize(("name", "words"), [
    ("changes an input", "key"), ("writes beside an input", "value"), ("changes the selection", "expiry"),
])  # fmt: skip
def test_what_all_candidates_share_may_not_change(monkeypatch, name, words, late):
    by_reference.install(monkeypatch.setattr)
    module._solved.cache_clear()
    stage = Stage(spec(MEMORY[name][0]), "measure")
    stage.prepare()
    stage.check()
    stage.verify(bad(late + name))  # whatever it says
    with pytest.raises(MemoryCorrupted, match=f"beside it: .*{words}") as error:
        stage.check()
    assert ("n=461" in str(error.value)) == (late == "")
    module._solved.cache_clear()


@pytest.mark.parametrize("kept", ["its own", "another", "none"])
@pytest.mark.parametrize("name", ["changes an input", "writes beside an input", "changes the selection"])
def test_nor_on_small_problems_alone_whichever_stage_is_kept(monkeypatch, name, kept):
    by_reference.install(monkeypatch.setattr)
    monkeypatch.setattr(by_reference, "install", lambda: None)
    module._solved.cache_clear()
    template = MEMORY[name][0]
    service = BenchService(FACTORY, "measure")
    if kept != "none":
        service.prepare(spec(template if kept == "its own" else "threshold"))
    assert service.verify_cases(spec(template), GOOD) is None
    with pytest.raises(MemoryCorrupted, match="n=461"):
        service.verify_cases(spec(template), bad(f"small {name}"))
    module._solved.cache_clear()


def test_a_reference_that_was_damaged_is_noticed(monkeypatch):
    by_reference.install(monkeypatch.setattr)
    for damage in (lambda s: s._cases[2].want["out"], lambda s: s._baseline["out"]):
        module._solved.cache_clear()
        stage = Stage(spec("forward"), "measure")
        stage.prepare()
        damage(stage)[0, 0, 0, 0] += 1
        with pytest.raises(MemoryCorrupted, match="out"):
            stage.check()
    module._solved.cache_clear()


def test_without_memory_for_redzones_the_timed_length_is_verified_all_the_same(stages, monkeypatch):
    """They keep every buffer until the end; what is poisoned alone takes what a launch takes."""
    real, sizes = module.redzones, []

    def scarce(size=module.SIZE):
        sizes.append(size)
        if size and len(sizes) > 4:  # the small cases come first
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(size)

    stage = stages("forward")
    monkeypatch.setattr(module, "redzones", scarce)
    assert stage.verify(GOOD) is None and sizes[4:] == [module.SIZE, 0]
    sizes.clear()
    assert "against the default config" in stage.verify(bad("late one entry of out is nan"))


def test_a_sample_sees_a_wrong_selection(case):
    call, want = case
    for change, words in {
        None: None, "tau": "tau: query", "expiry": "expiry: query", "window": "expiry: query",
    }.items():  # fmt: skip
        got = {"tau": want["tau"].float(), "expiry": want["expiry"].int()}
        if change in got:
            got[change] += 1 if change == "expiry" else 0.01
        inputs = call.but(window=call.window - 1) if change == "window" else call
        reason = sample.difference(inputs, None, got, TOLERANCE["bf16"])
        assert reason is None if words is None else words in reason


# --- in a run, with processes


TINY = types.Effort(40, 120.0, 0.01, 3, 0.01, 4, 2, timeout=60.0)
CANDIDATES = {  # fault: what its reason says
    "one entry of out is nan": "n=512, against the default config: out: relative error nan",
    "late one tile is a tenth too large": "n=512, against the default config",
    "writes after the end": "MemoryCorrupted: out: written after its end",
    "changes an input": "MemoryCorrupted: written though only read, or beside it: key",
    "small one tile is a tenth too large": "normal scores, n=461: out",
    "small changes an input": r"MemoryCorrupted: written though only read, or beside it: key \(normal scores, n=461\)",
}


def _works(config, problem, device):
    """The fastest of all are wrong on small problems alone, then comes a right one, then the rest."""
    tile = 128 if config["fault"].startswith("small") else 32
    return None if config["tile"] == tile or config == Config(tile=64, fault="none") else "one is enough"


def test_a_process_that_was_damaged_judges_nobody_else(tmp_path, monkeypatch):
    """The fastest of all candidates comes last: a process whose inputs were changed would refuse it."""
    monkeypatch.setitem(EFFORTS, "tiny", TINY)
    template = Template(
        name="forward",
        fields=frozenset({"n"}),
        space=(
            Param("tile", Pow2(32, 128)),
            Param("fault", Choice(("none", *CANDIDATES, "changes an input when timed"))),
        ),
        default=lambda problem, device: Config(tile=32, fault="none"),
        check=_works,
        cost=lambda config, problem: Cost(1e12, 1e6),
        sources=(__file__,),
    )
    pids = []
    real = Bench.verify
    monkeypatch.setattr(Bench, "verify", lambda self, *a: pids.append(self._worker.pid) or real(self, *a))
    with Store(tmp_path / "cache.db") as store:
        options = {"effort": "tiny", "factory": FACTORY, "templates": {"forward": template}}
        (row,) = tune([PROBLEM], faults.DEVICE, store, **options)
        results = {r.config: r.result for r in store.measurements(faults.DEVICE, template, PROBLEM)}
    for fault, words in CANDIDATES.items():
        result = results[Config(tile=128 if fault.startswith("small") else 32, fault=fault)]
        assert result.status == "wrong" and re.search(words, result.reason), result
    timed = results[Config(tile=32, fault="changes an input when timed")]
    assert timed.status == "wrong" and "key" in timed.reason and "n=461" not in timed.reason
    assert row.config == Config(tile=64, fault="none") and row.wrong == 7 and row.failed == 0
