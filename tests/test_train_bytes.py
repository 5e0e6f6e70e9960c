"""The training example, at a size that a CPU trains in seconds."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

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


def test_seed_decides(example):
    runs = [example.main([*TINY, "--steps", "3", "--seed", seed])["losses"] for seed in ("1", "1", "2")]
    assert runs[0] == runs[1] != runs[2]
