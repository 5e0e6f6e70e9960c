"""Random inputs have the statistics that they are named for; recordings are refused where they do not fit."""

from __future__ import annotations

import pytest
import torch

from sparsek_tune.bench import inputs
from sparsek_tune.bench.cases import Case
from sparsek_tune.bench.inputs import RecordingError
from sparsek_tune.presets import Shape

SHAPE = Shape(hq=4, hkv=2, d=8, n=20000, k=16, w=4, dtype="fp32", b=2)


def test_iid_scores_are_normal_with_deviation_3():
    u = inputs.make(Case(SHAPE, "iid"), 0, "cpu").scores
    assert u.shape == (2, 2, 20000) and u.dtype == torch.float32
    assert u.mean().abs() < 0.1 and abs(u.std() - 3) < 0.1
    half = u.shape[-1] // 2
    assert (u[..., :half].mean() - u[..., half:].mean()).abs() < 0.1


def test_slope_is_iid_plus_a_thousandth_per_position():
    a, b = (inputs.make(Case(SHAPE, name), 0, "cpu") for name in ("iid", "slope"))
    assert torch.allclose(b.scores - a.scores, 1e-3 * torch.arange(20000), atol=1e-3)
    assert torch.equal(a.query, b.query)  # so that a peer which sees no scores may share its timing


def test_seed_layout_and_cuts():
    shape = Shape(hq=4, hkv=2, d=8, n=32, k=99, w=64)
    i, j, other = (inputs.make(Case(shape, "iid"), seed, "cpu") for seed in (0, 0, 1))
    assert torch.equal(i.key, j.key) and not torch.equal(i.key, other.key)
    assert (i.k, i.window, i.gate) == (32, 32, "kv") and i.query.dtype == torch.bfloat16
    assert i.query.shape == (1, 4, 32, 8) and i.query.transpose(1, 2).is_contiguous()
    short = inputs.shorter(i, 16)
    assert short.query.shape == (1, 4, 16, 8) and (short.k, short.window) == (16, 16)


def recording(hq=4, hkv=2, n=64, d=8):
    q, k = torch.randn(1, hq, n, d), torch.randn(1, hkv, n, d)
    return {"query": q, "key": k, "value": k + 1, "scores": torch.randn(1, hkv, n)}


def test_trained_takes_the_first_positions(tmp_path):
    found = recording()
    torch.save(found, tmp_path / "r.pt")
    case = Case(Shape(hq=4, hkv=2, d=8, n=48, k=8, w=0, dtype="fp32"), "trained")
    i = inputs.make(case, 0, "cpu", inputs.load(tmp_path / "r.pt"))
    assert torch.equal(i.query, found["query"][:, :, :48]) and torch.equal(i.scores, found["scores"][..., :48])
    assert torch.equal(i.value, found["value"][:, :, :48]) and i.key.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"n": 65}, "has n=64, the shape needs n=65"), ({"hq": 8}, "hq=4, the shape has hq=8"), ({"d": 16}, "d=8"),
     ({"hkv": 4}, "hkv=2"), ({"b": 2}, "b=1")],
)  # fmt: skip
def test_a_recording_that_does_not_fit_is_refused(change, words):
    shape = Shape(**{"hq": 4, "hkv": 2, "d": 8, "n": 64, **change})
    with pytest.raises(RecordingError, match=words):
        inputs.check_recorded(recording(), shape)


def test_files_that_are_no_recording_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(RecordingError, match="is no file of recorded tensors"):
        inputs.load(tmp_path / "text.pt")
    torch.save({"query": torch.zeros(1)}, tmp_path / "part.pt")
    with pytest.raises(RecordingError, match="lacks key, value, scores"):
        inputs.load(tmp_path / "part.pt")
    odd = {**recording(), "scores": torch.zeros(1, 2, 9)}
    with pytest.raises(RecordingError, match="recorded scores must be"):
        inputs.check_recorded(odd, Shape(hq=4, hkv=2, d=8, n=9))
