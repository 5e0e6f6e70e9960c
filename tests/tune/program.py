"""``sparsek-tune`` with stand-ins for kernels and GPU (``faults``), for tests that kill it, fill its disk or hold its
database: python program.py run ...

FAULTS_SPACE: JSON arguments of ``faults.template``; FAULTS_BUSY: seconds to wait for a database that others hold;
FAULTS_TIMEOUT: seconds for one step of a candidate.
"""

from __future__ import annotations

import json
import os

import faults

import sparsek_tune.tune
from sparsek_tune import cli
from sparsek_tune.db import reader, sqlite
from sparsek_tune.tune import tuner, types


def tune(problems, device, store, **options):
    template = faults.template(**json.loads(os.environ["FAULTS_SPACE"]))
    options |= {"target": None, "templates": {template.name: template}, "factory": faults.FACTORY}
    return tuner.tune([faults.PROBLEM], faults.DEVICE, store, **options)


if __name__ == "__main__":
    sqlite.BUSY_SECONDS = reader.BUSY_SECONDS = float(os.environ.get("FAULTS_BUSY", sqlite.BUSY_SECONDS))
    types.EFFORTS["default"] = types.Effort(
        40, 60.0, 0.01, 3, 0.01, 4, 2, timeout=float(os.environ.get("FAULTS_TIMEOUT", 3.0))
    )
    sparsek_tune.tune.tune = tune
    cli._gpu = lambda index: faults.DEVICE
    cli.main()
