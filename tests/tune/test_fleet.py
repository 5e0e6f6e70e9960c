"""Several processes at one suite, with real databases: no work twice, none lost whoever dies, models kept apart."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import event_lines
import pytest

from sparsek_tune.db.store import Store
from sparsek_tune.tune import studies

FLEET = Path(__file__).parent / "fleet.py"
SLOW = {"tiles": [8, 512], "faults": ["slow"]}  # seven configs, a fifth of a second each


class Fleet:
    def __init__(self, directory, **env):
        self.database, self.log = directory / "cache.db", directory / "log"
        self.env = {**os.environ, "SPARSEK_TUNE_CACHE": str(self.database), "FAULTS_LOG": str(self.log),
                    "FAULTS_SPACE": json.dumps(SLOW), **env}  # fmt: skip
        self.processes = []

    def start(self, *arguments):
        command = [sys.executable, str(FLEET), *arguments, "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.processes.append(subprocess.Popen(command, env=self.env, **pipes))
        return self.processes[-1]

    def end(self, process):
        """Exit code, lines, stderr."""
        out, err = process.communicate(timeout=120)
        return process.returncode, event_lines.parse(out), err

    def ask(self, query):
        if not self.database.exists():
            return []
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=10)) as connection:
            try:
                return connection.execute(query).fetchall()
            except sqlite3.OperationalError:  # not made yet
                return []

    def wait_for(self, query, count):
        end = time.monotonic() + 60
        while len(self.ask(query)) < count:
            assert time.monotonic() < end, [p.poll() for p in self.processes]
            time.sleep(0.02)

    def searched(self):
        """How many times each config was tried for each device, template and problem, but for races."""
        return Counter(self.ask(
            "SELECT m.device_id, m.template_id, m.problem_id, m.config_id FROM measurement m "
            "WHERE m.protocol NOT LIKE '%race%'"
        ))  # fmt: skip

    def pids(self, *kinds):
        return {int(line.split()[-1]) for line in self.log.read_text().splitlines() if line.split()[0] in kinds}


@pytest.fixture
def fleet(tmp_path):
    fleets = []

    def make(**env):
        fleets.append(Fleet(tmp_path, **env))
        return fleets[-1]

    yield make
    for process in [p for f in fleets for p in f.processes if p.poll() is None]:
        process.kill()
        process.communicate()


def check_done(fleet, rows, *, devices=1, problems=3):
    """All configs of all problems were tried once, and the best is served."""
    assert [row["config"]["tile"] for row in rows] == [512] * 2 * problems, rows
    assert set(fleet.ask("SELECT status FROM measurement")) == {("ok",)}
    tried = fleet.searched()
    assert set(tried.values()) == {1} and len(tried) == 7 * 2 * problems * devices
    assert len(fleet.ask("SELECT * FROM winner")) == 2 * problems * devices
    assert fleet.ask("PRAGMA integrity_check") == [("ok",)]


def test_two_gpus_share_a_suite(fleet):
    fleet = fleet(FLEET_GPUS='["same", "same"]')
    code, lines, err = fleet.end(fleet.start("run", "--gpus", "all"))
    assert code == 0, err
    check_done(fleet, lines[-1]["rows"])
    assert len(fleet.pids("measure")) == 2  # one process measures on each
    raced = fleet.ask("SELECT DISTINCT run_id, problem_id FROM measurement WHERE protocol LIKE '%race%'")
    assert len({run for run, _ in raced}) == 2 and len(raced) == 3  # each problem was driven by one


def test_who_finds_no_problem_helps_with_a_search(fleet):
    fleet = fleet(
        FLEET_GPUS='["same", "same"]', FLEET_PROBLEMS="1", FAULTS_SPACE=json.dumps({**SLOW, "tiles": [1, 1 << 24]})
    )
    code, lines, err = fleet.end(fleet.start("run", "--gpus", "0,1"))
    assert code == 0, err
    tried = fleet.searched()
    assert set(tried.values()) == {1} and len(tried) == 25 * 2 and len(lines[-1]["rows"]) == 2
    by_run = Counter(run for (run,) in fleet.ask("SELECT run_id FROM measurement WHERE protocol NOT LIKE '%race%'"))
    assert len(by_run) == 2 and min(by_run.values()) >= 3
    assert len(fleet.ask("SELECT DISTINCT run_id FROM measurement WHERE protocol LIKE '%race%'")) == 1


def test_another_model_has_a_suite_of_its_own(fleet):
    fleet = fleet(FLEET_GPUS='["big", "small"]')
    code, lines, err = fleet.end(fleet.start("run", "--gpus", "all"))
    assert code == 0, err
    check_done(fleet, lines[-1]["rows"], devices=2)
    mixed = "SELECT run_id FROM measurement GROUP BY run_id HAVING COUNT(DISTINCT device_id) > 1"
    assert fleet.ask(mixed) == []


def test_a_worker_that_is_killed_costs_nothing_but_time(fleet):
    fleet = fleet(FLEET_GPUS='["same", "same"]')
    main = fleet.start("run")
    fleet.wait_for("SELECT id FROM measurement", 1)
    worker = fleet.start("worker")
    fleet.wait_for("SELECT DISTINCT run_id FROM measurement", 2)
    worker.kill()
    code, lines, err = fleet.end(main)
    assert code == 0, err
    check_done(fleet, lines[-1]["rows"])


def test_workers_finish_what_the_killed_process_began(fleet):
    fleet = fleet(FLEET_GPUS='["same", "same"]')
    main = fleet.start("run")
    fleet.wait_for("SELECT id FROM measurement", 3)
    worker = fleet.start("worker", "--wait", "1")
    fleet.wait_for("SELECT DISTINCT run_id FROM measurement", 2)
    main.kill()
    code, _, err = fleet.end(worker)
    assert code == 0, err
    check_done(fleet, [{"config": json.loads(k)} for (k,) in fleet.ask(
        "SELECT c.key FROM winner w JOIN measurement m ON m.id = w.measurement_id JOIN config c ON c.id = m.config_id"
    )])  # fmt: skip


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_ctrl_c_and_a_killed_child_of_gpus(fleet, victim):
    fleet = fleet(FLEET_GPUS='["same", "same"]')
    main = fleet.start("run", "--gpus", "all")
    fleet.wait_for("SELECT DISTINCT run_id FROM measurement", 2)
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(main.pid)], text=True, capture_output=True
    ).stdout
    (child,) = [int(line.split()[0]) for line in children.splitlines() if "fleet.py" in line]
    if victim == "child":
        os.kill(child, signal.SIGKILL)
        code, lines, err = fleet.end(main)
        assert code == 0, err
        check_done(fleet, lines[-1]["rows"])
        assert any("GPU 1 ended (killed by SIGKILL)" in line.get("message", "") for line in lines)
        return
    main.send_signal(signal.SIGINT)
    code, lines, err = fleet.end(main)
    assert code == 130 and "is kept" in lines[-1]["error"]
    assert not Path(f"/proc/{child}").exists()
    code, lines, err = fleet.end(fleet.start("run"))
    assert code == 0, err
    check_done(fleet, lines[-1]["rows"])


def test_a_worker_that_is_killed_while_it_claims_a_config(fleet):
    """Its third claim: the first is a problem, the second a config."""
    fleet = fleet(FLEET_GPUS='["same", "same"]', FLEET_DIES="3")
    start = time.monotonic()
    code, lines, err = fleet.end(fleet.start("run", "--gpus", "all"))
    assert code == 0, err
    check_done(fleet, lines[-1]["rows"])
    assert any("GPU 1 ended (killed by SIGKILL)" in line.get("message", "") for line in lines)
    assert time.monotonic() - start < 100  # not until the time of a problem, 120 s, is over


def four_static_workers(fleet, winners, *storage):
    """Four processes and a run; one of them is killed as soon as it has worked at something."""
    target = ("--target", "cuda:90", "--jobs", "1", *storage)
    workers = [fleet.start("worker", *target, "--wait", "60") for _ in range(4)]
    main = fleet.start("run", *target[:2], *storage)
    victim = at_work(fleet, "interpret", workers)
    victim.kill()
    workers.remove(victim)
    code, lines, err = fleet.end(main)
    assert code == 0, err
    rows = lines[-1]["rows"]
    assert len(rows) == 12 and all(row["config"] for row in rows) and winners() == 12
    for worker in workers:
        worker.send_signal(signal.SIGINT)  # it waits for another run
        assert fleet.end(worker)[0] == 130


def at_work(fleet, kind, processes):
    """Wait until one of the processes has begun to verify; which one."""
    end = time.monotonic() + 90
    while True:
        parents = {_parent(pid) for pid in fleet.pids(kind)} if fleet.log.exists() else ()
        if found := [process for process in processes if process.pid in parents]:
            return found[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def test_four_static_workers_one_killed(fleet):
    fleet = fleet(FAULTS_SPACE=json.dumps({"tiles": [8, 512]}), FLEET_PROBLEMS="6")
    four_static_workers(fleet, lambda: len(fleet.ask("SELECT * FROM winner")))


def test_four_static_workers_on_a_server_one_killed(fleet, database, postgres):
    fleet = fleet(FAULTS_SPACE=json.dumps({"tiles": [8, 512]}), FLEET_PROBLEMS="6")
    name = database.rpartition("/")[2]
    count = "SELECT count(*) FROM sparsek_tune.winner"
    four_static_workers(fleet, lambda: postgres.sql(count, name)[0][0], "--storage", database)
    studies = [s for (s,) in postgres.sql("SELECT study_name FROM studies", name)]
    assert len(studies) == 1 and studies[0].startswith("suite on target cuda:90")


def test_two_gpus_share_a_suite_on_a_server(fleet, database, postgres):
    fleet = fleet(FLEET_GPUS='["same", "same"]')
    code, lines, err = fleet.end(fleet.start("run", "--gpus", "all", "--storage", database))
    assert code == 0, err
    assert [row["config"]["tile"] for row in lines[-1]["rows"]] == [512] * 6
    name = database.rpartition("/")[2]
    tried = postgres.sql(
        "SELECT count(*) FROM sparsek_tune.measurement WHERE protocol NOT LIKE '%race%' "
        "GROUP BY template_id, problem_id, config_id",
        name,
    )
    assert tried == [(1,)] * 42


def test_without_a_run_to_join_a_worker_says_so(fleet):
    fleet = fleet()
    code, lines, _ = fleet.end(fleet.start("worker"))
    assert code == 4 and "there is no database" in lines[-1]["error"] and not fleet.database.exists()
    with Store(fleet.database):
        pass
    code, lines, _ = fleet.end(fleet.start("worker"))
    assert code == 5 and "no run to join" in lines[-1]["error"]
    assert not studies.path_beside(fleet.database).exists()
