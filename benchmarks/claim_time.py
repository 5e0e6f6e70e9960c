"""What it costs to share a search: milliseconds a config to propose, claim and settle it, alone and beside others.

    python benchmarks/claim_time.py [postgresql+psycopg://USER@HOST/DATABASE]

Needs no GPU. For comparison: Optuna's own ask and tell on its storage in memory and in a file.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import optuna

from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.presets import shapes
from sparsek_tune.problem import target_device
from sparsek_tune.tune import samplers
from sparsek_tune.tune.board import Board
from sparsek_tune.tune.space import suggest
from sparsek_tune.tune.studies import Studies

COUNT = 100
TEMPLATE, DEVICE = TEMPLATES["forward"], target_device("cuda:90")
PROBLEM = shapes((), ())[0].problem


def timed(call):
    start = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - start) * 1e3


def optunas(url):
    sampler = samplers.make("tpe", TEMPLATE, PROBLEM, DEVICE, 0)
    study = optuna.create_study(storage=url, sampler=sampler)
    asked, told = [], []
    for i in range(COUNT):
        trial = study.ask()
        _, ms = timed(lambda trial=trial: suggest(TEMPLATE, trial))
        asked.append(ms)
        samplers.constrain(trial, works=True)
        told.append(timed(lambda trial=trial, i=i: study.tell(trial, 1.0 + i))[1])
    return f"ask {median(asked):.1f}, tell {median(told):.1f}"


def ours(shared, others):
    boards = [Board(shared, DEVICE, TEMPLATE, PROBLEM, print) for _ in range(others + 1)]
    claims, settled = [], []
    for at, config in enumerate(list(TEMPLATE.feasible(PROBLEM, DEVICE))[: COUNT * (others + 1)]):
        board = boards[at % len(boards)]
        claims.append(timed(lambda board=board, config=config: board.claim(config))[1])
        settled.append(timed(lambda board=board, config=config: board.settle(config, "ok", 1.0))[1])
    return f"claim {median(claims):.1f}, settle {median(settled):.1f}"


def main():
    with tempfile.TemporaryDirectory() as directory:
        print("Optuna in memory:", optunas(None))
        print("Optuna in a file:", optunas(f"sqlite:///{directory}/optuna.db"))
        places = [("file", Path(directory, "cache.db")), *(("server", url) for url in sys.argv[1:2])]
        for name, where in places:
            shared, ms = timed(lambda where=where: Studies.of(where))
            print(f"{name}: opened in {ms:.0f}; alone: {ours(shared, 0)}; beside another: {ours(shared, 1)}")
            shared.close()


if __name__ == "__main__":
    main()
