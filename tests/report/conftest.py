"""What several tests look at."""

from __future__ import annotations

import pytest
import simulated


@pytest.fixture(scope="session")
def records():
    """Of two GPUs and two problems."""
    return simulated.simulate()
