import pytest

from sparsek_tune.presets import MODELS, Shape, parse_fields, shapes


def test_models_are_valid_shapes():
    for hq, hkv, d in MODELS.values():
        assert Shape(hq=hq, hkv=hkv, d=d).problem.g == hq // hkv


def test_a_text_wins_over_the_model_and_both_multiply():
    found = shapes(("llama-3.1-8b", "gpt2-small"), ("n=4096", "n=8192,d=32"))
    assert [(s.hq, s.d, s.n) for s in found] == [(32, 128, 4096), (32, 32, 8192), (12, 64, 4096), (12, 32, 8192)]


def test_equal_shapes_come_once():
    assert len(shapes(("qwen3-4b", "qwen3-8b"), ("n=4096",))) == 1


def test_the_default_suite_has_three_problems():
    assert len({s.problem for s in shapes((), ())}) == 3


def test_problem_buckets_length_and_rows_only():
    p = Shape(n=5000, b=3, hkv=5, hq=10, k=1000, w=300).problem
    assert (p.n, p.rows, p.g, p.k, p.w) == (8192, 16, 2, 1000, 300)


@pytest.mark.parametrize("text", ["n", "n=", "n=1.5", "n=1e3", "n=" + "9" * 5000, "n=--1", "foo=1", "n=²"])
def test_bad_fields(text):
    with pytest.raises(ValueError):
        parse_fields(text)


@pytest.mark.parametrize(
    "most, beyond, words",
    [
        ({"hq": 512, "hkv": 8}, {"hq": 520}, "hq must be at most 512 at hkv 8, d 128, bf16, but is 520"),
        ({"hq": 32, "hkv": 1, "d": 256, "dtype": "fp32"}, {"hq": 33}, "hq must be at most 32 at hkv 1, d 256, fp32"),
        ({"b": 8191, "hkv": 8}, {"b": 8192}, "b must be at most 8191 at hkv 8, but is 8192"),
        ({"hq": 65535, "hkv": 65535}, {"hq": 65536, "hkv": 65536}, "hkv must be at most 65535, but is 65536"),
        ({"n": 2**29}, {"n": 2**29 + 1}, "n must be at most 536870912, but is 536870913"),
        ({"k": 2**31 - 1}, {"k": 2**31}, "k must be at most 2147483647"),
        ({"w": 2**31 - 1}, {"w": 2**31}, "w must be at most 2147483647"),
        ({"d": 256}, {"d": 257}, "d must be at most 256, but is 257"),
    ],
)
def test_what_the_operators_would_refuse_is_no_shape(most, beyond, words):
    Shape(**most)
    with pytest.raises(ValueError, match=words):
        Shape(**{**most, **beyond})
