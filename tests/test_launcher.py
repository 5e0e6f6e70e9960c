"""Launches by ``sparsek_tune.launcher`` ask the driver for what Triton's own launches ask, to the byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent / "fake_cuda"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_launches_are_those_of_triton(tmp_path):
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-I", headers, HERE / "cuda.c", "-o", library], check=True)
    env = {
        **os.environ,
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([sys.executable, HERE / "case.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compared 120")
