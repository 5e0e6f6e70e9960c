"""Makes ``test_page`` importable, here and elsewhere; what several tests look at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import simulated

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def records():
    """Of two GPUs and two problems."""
    return simulated.simulate()
