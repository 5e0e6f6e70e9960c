"""Makes ``faults`` importable, here and in the worker processes (they get this process's path)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """The file that ``faults.gate`` waits for."""
    monkeypatch.setenv("FAULTS_GATE", str(tmp_path / "gate"))
    return tmp_path / "gate"
