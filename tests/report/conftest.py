"""Makes ``simulated`` importable; what several tests look at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import simulated


@pytest.fixture(scope="session")
def records():
    """Of two GPUs and two problems."""
    return simulated.simulate()
