"""optuna-dashboard opens our studies."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import faults
import pytest

from sparsek_tune.db.store import Store
from sparsek_tune.tune import EFFORTS, types
from sparsek_tune.tune.board import name_of
from sparsek_tune.tune.studies import path_beside
from sparsek_tune.tune.tuner import tune

pytest.importorskip("optuna_dashboard", reason="needs optuna-dashboard")


def get(port, path, process):
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.2)


def test_the_dashboard_lists_our_studies(tmp_path, monkeypatch):
    monkeypatch.setitem(EFFORTS, "tiny", types.Effort(40, 60.0, 0.01, 3, 0.01, 4, 2, timeout=3.0))
    t = faults.template(faults=("none", "wrong"))
    with Store(tmp_path / "cache.db") as store:
        tune([faults.PROBLEM], faults.DEVICE, store, effort="tiny", templates={"fake": t}, factory=faults.FACTORY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from optuna_dashboard._cli import main; main()"
    storage = f"sqlite:///{path_beside(tmp_path / 'cache.db')}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, storage, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        found = {study["study_name"]: study for study in get(port, "/api/studies", process)["study_summaries"]}
        search = found.pop(name_of(faults.DEVICE, t, faults.PROBLEM))
        (suite,) = found
        assert suite.startswith("suite on fake GPU")
        trials = get(port, f"/api/studies/{search['study_id']}?after=0", process)["trials"]
        states = [trial["state"] for trial in trials]
        assert states.count("Complete") == 3 and states.count("Fail") == 4  # the default is settled before
    finally:
        process.kill()
        process.communicate()
