"""Fixtures of the GPU suite (``pytest -m gpu``)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory is NaN, or an absurd integer: what a kernel reads before it was written shows."""

    def poisoned(real):
        def allocate(*args, **kwargs):
            t = real(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else -(1 << 30))

        return allocate

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
