"""The training example, at a size that a CPU trains in seconds."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_bytes.py"
SIZES = {"context": 128, "batch": 2, "layers": 2, "dim": 32, "heads": 4, "kv-heads": 2, "k": 16, "window": 8}
TINY = ["--device=cpu", "--backend=aot_eager", "--lr=1e-2", "--log-every=1", *(f"--{n}={x}" for n, x in SIZES.items())]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_bytes", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_loss_falls(example, attention, tmp_path, capsys):
    file = tmp_path / "curve.json"
    result = example.main([*TINY, "--steps", "20", "--attention", attention, "--json", str(file)])
    losses = result["losses"]
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    assert abs(losses[0] - math.log(256)) < 1  # nothing is known at the start
    assert sum(losses[-3:]) / 3 < losses[0] - 0.5
    assert json.loads(file.read_text())["losses"] == losses
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "config of attention" in printed
    if attention == "sparse":
        assert len(result["scorer_moved"]) == 2 and min(result["scorer_moved"]) > 1e-3


def test_record_keeps_what_the_layers_were_given(example, tmp_path, monkeypatch):
    """All layers side by side, longer than the trained context, from the model as it is after training."""
    file, seen = tmp_path / "trained.pt", []
    attention = example.sparsek_attention
    spy = lambda *args, **options: seen.append(args[:4]) or attention(*args, **options)  # noqa: E731
    monkeypatch.setattr(example, "sparsek_attention", spy)
    example.main([*TINY, "--steps", "1", "--record", str(file), "--record-length", "150"])
    found = torch.load(file, weights_only=True)
    assert {name: list(x.shape) for name, x in found.items()} == {
        "query": [1, 8, 150, 8], "key": [1, 4, 150, 8], "value": [1, 4, 150, 8], "scores": [1, 4, 150]
    }  # fmt: skip
    for name, *layers in zip(found, *seen[-2:], strict=True):
        assert torch.equal(found[name], torch.cat(layers, dim=1).to(found[name].dtype)), name


def test_record_refuses_what_it_cannot_do(example, tmp_path, capsys):
    for options, words in ((["--attention=dense"], "no scores"), ([], "does not exist")):
        with pytest.raises(SystemExit):
            example.main([*TINY, "--steps", "1", "--record", str(tmp_path / "no" / "t.pt"), *options])
        assert words in capsys.readouterr().err


def test_seed_decides(example):
    runs = [example.main([*TINY, "--steps", "3", "--seed", seed])["losses"] for seed in ("1", "1", "2")]
    assert runs[0] == runs[1] != runs[2]
