"""What the operators refuse, and how they say it."""

from __future__ import annotations

import math

import pytest
import torch
from op_inputs import OPTIONS, backward_args, make

from sparsek_tune import arguments, ops
from sparsek_tune.ops import sparsek, sparsek_attention, sparsek_select


def bad(**changes):
    return lambda: {**dict(zip(("query", "key", "value", "scores"), make(), strict=True)), "k": 4, **changes}


def changed(name, change):
    def build():
        args = dict(zip(("query", "key", "value", "scores"), make(), strict=True))
        return {**args, "k": 4, name: change(args[name])}

    return build


INVALID = {
    "query no tensor": (bad(query=[1.0]), TypeError, r"query must be a torch.Tensor, but is list"),
    "query integer": (changed("query", torch.Tensor.int), TypeError, r"query must be floating point.*int32"),
    "query rank": (changed("query", lambda t: t[0]), ValueError, r"query must be \[B, Hq, N, D\].*\[4, 24, 8\]"),
    "query empty": (changed("query", lambda t: t[:, :, :0]), ValueError, r"query must be .*no size 0.*\[2, 4, 0, 8\]"),
    "query heads": (changed("query", lambda t: t[:, :3]), ValueError, r"key must be .*divisor of query's Hq = 3"),
    "query float8": (
        changed("query", lambda t: t.to(torch.float8_e4m3fn)),
        TypeError,
        r"query must be float32.*float8",
    ),
    "key rank": (changed("key", lambda t: t[0]), ValueError, r"key must be \[B, Hkv, N, D\].*\[2, 24, 8\]"),
    "key length": (
        changed("key", lambda t: t[:, :, 1:]),
        ValueError,
        r"key must be .*\[2, 2, 24, 8\].*\[2, 2, 23, 8\]",
    ),
    "key dtype": (changed("key", torch.Tensor.half), TypeError, r"key must have query's dtype torch.float32.*float16"),
    "key device": (changed("key", lambda t: t.to("meta")), ValueError, r"key must be on query's device cpu.*meta"),
    "value head size": (changed("value", lambda t: t[..., 1:]), ValueError, r"value must be of shape.*\[2, 2, 24, 7\]"),
    "value dtype": (changed("value", torch.Tensor.double), TypeError, r"value must have query's dtype.*float64"),
    "scores rank": (changed("scores", lambda t: t[..., None]), ValueError, r"scores must be of shape \[B, Hkv, N\]"),
    "scores heads": (changed("scores", lambda t: t[:, :1]), ValueError, r"scores must be .*\[2, 2, 24\].*\[2, 1, 24\]"),
    "scores integer": (changed("scores", torch.Tensor.long), TypeError, r"scores must be floating point.*int64"),
    "scores float64": (
        changed("scores", torch.Tensor.double),
        TypeError,
        r"scores must be float32.*but is torch.float64",
    ),
    "k zero": (bad(k=0), ValueError, r"k must be in \[1, 2147483647\], but is 0"),
    "k huge": (bad(k=2**31), ValueError, r"k must be in .*2147483648"),
    "k bool": (bad(k=True), TypeError, r"k must be an int, but is True of type bool"),
    "k float": (bad(k=4.0), TypeError, r"k must be an int, but is 4.0 of type float"),
    "window negative": (bad(window=-1), ValueError, r"window must be in \[0, 2147483647\], but is -1"),
    "window none": (bad(window=None), TypeError, r"window must be an int, but is None"),
    "scale inf": (bad(scale=math.inf), ValueError, r"scale must be finite, but is inf"),
    "scale text": (bad(scale="1"), TypeError, r"scale must be a float or None, but is '1'"),
    "gate": (bad(gate="k"), ValueError, r"gate must be one of 'kv', 'v', 'none', but is 'k'"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_attention_arguments(case, monkeypatch):
    build, error, message = INVALID[case]
    monkeypatch.setattr(ops, "_Attention", None)  # nothing may get this far
    with pytest.raises(error, match=message):
        sparsek_attention(**build())


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(2, 3), 1), ValueError, r"scores must be \[B, Hkv, N\].*\[2, 3\]"),
        ((torch.zeros(2, 3, 0), 1), ValueError, r"scores must be .*no size 0"),
        ((torch.zeros(1, 2, 3, dtype=torch.int64), 1), TypeError, r"scores must be floating point"),
        (([1.0], 1), TypeError, r"scores must be a torch.Tensor"),
        ((torch.zeros(1, 2, 3), 0), ValueError, r"k must be in"),
        ((torch.zeros(1, 2, 3), 1.5), TypeError, r"k must be an int"),
    ],
)
def test_invalid_select_arguments(args, error, message):
    with pytest.raises(error, match=message):
        sparsek_select(*args)


def test_invalid_select_window():
    with pytest.raises(ValueError, match=r"window must be in \[0, 2147483647\], but is -3"):
        sparsek_select(torch.zeros(1, 2, 3), 1, window=-3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, 1), TypeError, r"z must be a torch.Tensor"),
        ((torch.zeros(3, dtype=torch.int32), 1), TypeError, r"z must be floating point"),
        ((torch.zeros(3), 0), ValueError, r"k must be in"),
        ((torch.zeros(3), 1, 1), ValueError, r"dim must be in \[-1, 1\) for z of shape \[3\], but is 1"),
        ((torch.zeros(3), 1, 0.5), TypeError, r"dim must be an int"),
    ],
)
def test_invalid_projection_arguments(args, error, message):
    with pytest.raises(error, match=message):
        sparsek(*args)


def test_the_ops_check_arguments_themselves():
    query, key, value, scores = make()
    with pytest.raises(ValueError, match="key must be of shape"):
        ops.ATTENTION(query, key[:, :, 1:], value, scores, *OPTIONS)
    with pytest.raises(ValueError, match="k must be in"):
        ops.SELECT(scores, 0, 0)
    dout, *rest = backward_args()
    with pytest.raises(ValueError, match="dout must be of shape"):
        ops.ATTENTION_BACKWARD(dout[:, :1], *rest)


def test_nan_scores_return():
    query, key, value, scores = make()
    scores[:, :, 3] = math.nan
    assert sparsek_attention(query, key, value, scores, 4, window=2).shape == query.shape


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 65, 1, 16, 32), "at most 64 heads per KV head"),
        ((1, 33, 1, 16, 256), "at most 32 heads per KV head at D 256"),
        ((65536, 1, 1, 16, 32), "65535 batches times KV heads"),
        ((1, 1, 1, 2**29 + 1, 32), "length of at most 536870912"),
        ((1, 1, 1, 16, 257), "head size"),
    ],
)
def test_extents_that_only_the_kernels_bound(shape, words):
    b, hq, hkv, n, d = shape
    query, key, value = (torch.empty(b, h, n, d, device="meta") for h in (hq, hkv, hkv))
    with pytest.raises(ValueError, match=words):
        arguments.check_attention(query, key, value, torch.empty(b, hkv, n, device="meta"), 4, 0, None, "kv")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": True}, "k must be an int, but is True"),
        ({"k": 1.0}, "k must be an int, but is 1.0"),
        ({"window": False}, "window must be an int"),
        ({"scale": True}, "scale must be a float"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"gate": ["kv"]}, "gate must be one of|unhashable"),
        ({"query": "text"}, "query must be a torch.Tensor"),
    ],
)
def test_what_passed_before_lets_nothing_else_pass(changed, words):
    """Values that are equal to those of a call that passed, and values without a hash, are looked at all the same."""
    query, key = torch.empty(1, 2, 4, 8), torch.empty(1, 1, 4, 8)
    good = {"query": query, "key": key, "value": key, "scores": torch.empty(1, 1, 4), "k": 1, "window": 0}
    good |= {"scale": 1.0, "gate": "kv"}
    for _ in range(2):
        arguments.check_attention(**good)
    with pytest.raises((TypeError, ValueError), match=words):
        arguments.check_attention(**{**good, **changed})


def test_what_passed_under_autocast_does_not_pass_without():
    query, key = torch.empty(1, 2, 4, 8, dtype=torch.bfloat16), torch.empty(1, 1, 4, 8)
    args = query, key, key, torch.empty(1, 1, 4), 1, 0, None, "kv"
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            arguments.check_attention(*args)
        with pytest.raises(TypeError, match="key must have query's dtype"):
            arguments.check_attention(*args)


def test_the_memory_of_what_passed_is_bounded(monkeypatch):
    monkeypatch.setattr(arguments, "MOST_PASSED", 3)
    for n in range(1, 10):
        t = torch.empty(1, 1, n, 8)
        arguments.check_attention(t, t, t, t[..., 0], 1, 0, None, "kv")
        assert len(arguments._passed) <= 3
