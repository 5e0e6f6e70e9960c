"""Which tests run in this process, and a cache of their own for all of them."""

import os
import shutil
import signal
import tempfile

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read when triton is imported: all tests of a process, or none

# Neither the user's database nor the user's compiled kernels are touched, by worker processes either; set before any
# test module is imported.
CACHE = tempfile.mkdtemp(prefix="sparsek-tests-")
os.environ.pop("SPARSEK_TUNE_STORAGE", None)
os.environ["SPARSEK_TUNE_CACHE"] = os.path.join(CACHE, "cache.db")
os.environ["TRITON_CACHE_DIR"] = os.path.join(CACHE, "triton")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, and all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    gpu = any(item.get_closest_marker("gpu") for item in items) and _has_gpu()
    for item in items:
        if (item.get_closest_marker("interpret") is not None) != INTERPRET:
            reason = "needs TRITON_INTERPRET unset" if INTERPRET else "needs TRITON_INTERPRET=1"
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _nothing_is_shipped(monkeypatch, tmp_path_factory):
    """What is shipped changes with every tuning; tests in this process are not to depend on it."""
    from sparsek_tune.db import reader

    monkeypatch.setattr(reader, "SHIPPED", tmp_path_factory.getbasetemp() / "nothing")


from database import cache, path, shared_dir  # noqa: E402, F401  fixtures of the database tests; after the cache is set
from server import database, postgres, where  # noqa: E402, F401
