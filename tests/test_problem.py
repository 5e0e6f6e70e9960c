import pytest

from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Choice, Config, Cost, Param, Pow2, Template, next_pow2
from sparsek_tune.problem import Problem, target_device

PROBLEM = Problem.of("bf16", 128, 4, "kv", 512, 0, 4097, 3)


def template(**changes):
    values = {
        "name": "t",
        "fields": frozenset({"n"}),
        "space": (
            Param("tile", Pow2(16, 64)),
            Param("mode", Choice(("a", "b"))),
            Param("depth", Choice((1, 2, 3)), when=lambda chosen: chosen["mode"] == "b"),
        ),
        "default": lambda p, d: Config(tile=16, mode="a", depth=1),
        "check": lambda c, p, d: "too large" if c["tile"] > 32 else None,
        "cost": lambda c, p: Cost(1.0, 1.0),
        "sources": (__file__,),
    }
    return Template(**{**values, **changes})


def test_problem_rounds_length_and_rows_up():
    assert (PROBLEM.n, PROBLEM.rows) == (8192, 4)
    assert Problem.of("bf16", 128, 4, "kv", 512, 0, 4096, 1)[-2:] == (4096, 1)
    assert Problem.of("bf16", 128, 4, "kv", 1, 0, 1, 1).n == 1


def test_projection_drops_what_a_kernel_does_not_use():
    other = PROBLEM._replace(d=64, g=1, gate="v", dtype="fp32")
    fields = TEMPLATES["threshold"].fields
    assert other.project(fields) == PROBLEM.project(fields)
    assert other.project(TEMPLATES["forward"].fields) != PROBLEM.project(TEMPLATES["forward"].fields)


def test_conditions_collapse_the_space():
    t = template()
    configs = list(t.configs())
    assert len(configs) == len(set(configs)) == t.size == 3 * (1 + 3)
    assert all(c["depth"] == 1 for c in configs if c["mode"] == "a")
    assert {c["tile"] for c in t.feasible(PROBLEM, target_device("cuda:90"))} == {16, 32}


def test_contains():
    t = template()
    assert t.contains({"tile": 64, "mode": "b", "depth": 3})
    assert not t.contains({"tile": 48, "mode": "b", "depth": 3})
    assert not t.contains({"tile": 64, "mode": "b"})
    assert not t.contains({"tile": 64, "mode": "b", "depth": 3, "more": 1})


def test_config_is_hashable_by_content_and_survives_its_key():
    a, b = Config(x=1, y=True), Config(y=True, x=1)
    assert a == b and hash(a) == hash(b) and Config.from_key(a.key) == a
    assert Config(x=2).key != Config(x=1).key


def test_source_hash_sees_text_not_line_ends(tmp_path):
    hashes = []
    for i, text in enumerate(("a = 1\n", "a = 1\r\n", "a = 2\n")):
        path = tmp_path / f"{i}.py"
        path.write_bytes(text.encode())
        hashes.append(template(sources=(str(path),)).source_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_cost_is_a_roofline():
    assert Cost(100.0, 1.0, 0).seconds(10.0, 10.0) == 10.0
    assert Cost(1.0, 100.0, 0).seconds(10.0, 20.0) == 5.0


@pytest.mark.parametrize("target", ["cuda", "cuda:91", "hip:90", "cuda:x", ""])
def test_unknown_target(target):
    with pytest.raises(ValueError, match="cuda:90"):
        target_device(target)


def test_next_pow2():
    assert [next_pow2(n) for n in (0, 1, 2, 3, 80, 128, 129)] == [1, 1, 2, 4, 128, 128, 256]
