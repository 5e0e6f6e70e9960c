"""Which tests run in this process, and files of its own for all of them."""

import importlib.util
import os

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config):
    # Neither the user's tuned configs nor the user's compiled kernels are touched, in worker processes either.
    tmp = config.getoption("--basetemp", None) or os.path.join("/tmp", f"sparsek-tests-{os.getuid()}")
    os.makedirs(tmp, exist_ok=True)
    os.environ["SPARSEK_TUNE_CACHE"] = os.path.join(tmp, f"cache-{os.getpid()}.db")
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tmp, "triton"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    reasons = {
        "gpu": None if not INTERPRET and _has_gpu() else "needs a CUDA device (and no TRITON_INTERPRET)",
        "interpret": None if INTERPRET else "needs TRITON_INTERPRET=1",
        "compile90": "needs TRITON_INTERPRET unset" if INTERPRET else None,
    }
    if importlib.util.find_spec("triton") is None:
        reasons["compile90"] = "needs triton"
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
