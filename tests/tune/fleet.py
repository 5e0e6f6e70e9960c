"""``sparsek-tune`` with stand-ins for kernels and for several GPUs, for tests of processes that tune together:
python fleet.py run|worker ...

FLEET_GPUS: JSON list of the GPUs' names; FLEET_PROBLEMS: how many problems; FLEET_DIES: the claim during which a worker
is killed, by number; FAULTS_SPACE: see program.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys

import faults

import sparsek_tune.tune
from sparsek_tune import cli, crew, options
from sparsek_tune.tune import studies, tuner, types

GPUS = [dataclasses.replace(faults.DEVICE, name=name) for name in json.loads(os.environ.get("FLEET_GPUS", '["one"]'))]
PROBLEMS = [faults.PROBLEM._replace(n=1024 << i) for i in range(int(os.environ.get("FLEET_PROBLEMS", "3")))]
SPACE = json.loads(os.environ.get("FAULTS_SPACE", "{}"))
TEMPLATES = {name: faults.template(name, **SPACE) for name in ("one", "two")}
WORLD = {"templates": TEMPLATES, "factory": faults.FACTORY}


def tune(problems, device, store, *, target=None, **settings):
    return tuner.tune(PROBLEMS, faults.STATIC if device.static else device, store, **settings, **WORLD)


def join(store, device, **settings):
    return tuner.join(store, faults.STATIC if device.static else device, **settings, **WORLD)


def gpu(index):
    return GPUS[index or 0]


def gpus(text):
    return {i: device for i, device in enumerate(GPUS) if text == "all" or str(i) in text.split(",")}


def die_while_claiming(number):
    real, calls = studies.Studies.take, itertools.count(1)

    def take(self, study, trial):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, study, trial)

    studies.Studies.take = take


if __name__ == "__main__":
    if sys.argv[1] == "worker" and "FLEET_DIES" in os.environ:
        die_while_claiming(int(os.environ["FLEET_DIES"]))
    types.EFFORTS["default"] = types.Effort(40, 120.0, 0.01, 3, 0.01, 40, 2, timeout=30.0)
    studies.INTERVAL, studies.GRACE = 1, 3
    sparsek_tune.tune.tune, sparsek_tune.tune.join = tune, join
    options.gpu, options.gpus = gpu, gpus
    crew.COMMAND = [sys.executable, __file__]
    cli.main()
