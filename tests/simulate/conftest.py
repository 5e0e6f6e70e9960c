"""Makes ``synthetic`` importable; a sweep as a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import simulated

from sparsek_tune.db import records as portable
from sparsek_tune.kernel_templates import TEMPLATES


@pytest.fixture(scope="session")
def sweep():
    """Records of every config of ``schedule`` at two problems, and of 20 of ``forward`` at each."""
    found = []
    for name, trials in (("schedule", 1000), ("forward", 20)):
        found += simulated.simulate(devices=[simulated.H100], trials=trials, templates={name: TEMPLATES[name]})
    return found


@pytest.fixture
def file(tmp_path, sweep):
    path = tmp_path / "sweep.jsonl"
    with path.open("w") as out:
        portable.write(out, sweep)
    return path
