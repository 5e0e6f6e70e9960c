"""Makes ``fake_machine`` importable; the fixtures that put it in the GPU's place."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import fake_machine

from sparsek_tune.bench import machine, ours
from sparsek_tune.problem import target_device

DEVICE = replace(target_device("cuda:90"), name="a CPU in disguise")


@pytest.fixture
def cpu(monkeypatch):
    """Everything runs on the CPU, by the reference. Returns the machine that is used."""
    made = fake_machine.Cpu()
    monkeypatch.setattr("sparsek_tune.options.gpu", lambda index: DEVICE)
    monkeypatch.setattr(machine, "Cuda", lambda l2: made)
    monkeypatch.setattr(ours, "stages", fake_machine.reference_stages)
    return made


@pytest.fixture
def device():
    return DEVICE
