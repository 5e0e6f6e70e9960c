"""Whole runs, with real processes and a real file, while they are killed, the disk fills, others hold the database.

What was recorded stays, the next run goes on from it, or the message and the exit code say what is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import event_lines
import pytest
from click.testing import CliRunner
from database import FORK, count, execute, make

from sparsek_tune import cli
from sparsek_tune.db import reader, records, transfer
from sparsek_tune.db.store import Store

FAULTS = Path(__file__).parents[1] / "docs" / "faults.md"
PROGRAM = Path(__file__).parent / "tune" / "program.py"
SLOW = {"tiles": [8, 512], "faults": ["slow"]}  # seven candidates, a fifth of a second each


class World:
    """A database, and a program that tunes into it."""

    def __init__(self, directory: Path, **space):
        self.directory, self.database, self.log = directory, directory / "cache.db", directory / "log"
        self.env = {
            **os.environ,
            "SPARSEK_TUNE_CACHE": str(self.database),
            "FAULTS_LOG": str(self.log),
            "FAULTS_LOST": str(directory / "lost"),
            "FAULTS_SPACE": json.dumps({**SLOW, **space}),
        }

    def start(self, *arguments, **options):
        command = [sys.executable, str(PROGRAM), *(arguments or ("run", "--json"))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.env, **pipes, **options)

    def run(self, *arguments, **options):
        """Exit code, stdout, stderr."""
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    def ask(self, query):
        if not self.database.exists():
            return []
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            try:
                return connection.execute(query).fetchall()
            except sqlite3.Error:  # not made yet
                return []

    def wait_for(self, measurements):
        end = time.monotonic() + 60
        while len(found := self.ask("SELECT id FROM measurement")) < measurements:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        return {row[0] for row in found}

    def pids(self, *kinds):
        return [int(line.split()[-1]) for line in self.log.read_text().splitlines() if line.split()[0] in kinds]

    def check(self):
        """The file is whole, and what is served was measured."""
        assert count(self.database) == len(self.ask("SELECT id FROM measurement"))
        assert execute(self.database, "PRAGMA foreign_key_check") == []
        served = execute(self.database, "SELECT m.status FROM winner w JOIN measurement m ON m.id = w.measurement_id")
        assert all(status in ("ok", "static") for (status,) in served)

    def searched(self):
        """Configs that were tried, once for each time, but for races."""
        rows = self.ask(
            "SELECT c.key FROM measurement m JOIN config c ON c.id = m.config_id WHERE m.protocol NOT LIKE '%race%'"
        )
        return [json.loads(key) for (key,) in rows]

    def finish(self):
        """The next run goes on to the right winner, and has tried nothing twice."""
        self.env["FAULTS_HEALED"] = "1"
        code, out, err = self.run()
        assert code == 0, err
        (row,) = event_lines.parse(out)[-1]["rows"]
        tried = [(config["tile"], config["fault"]) for config in self.searched()]
        assert len(tried) == len(set(tried)) == row["tried"] and {tile for tile, _ in tried} == {
            8 << i for i in range(7)
        }
        assert row["config"]["tile"] == 512 and row["failed"] == 0
        self.check()


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def gone(pid, seconds=10.0):
    """Whether the process ends in time; a zombie has."""
    end = time.monotonic() + seconds
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.02)


# --- killed


def test_a_run_that_is_killed_leaves_no_process_and_the_next_goes_on(tmp_path):
    """Twice, while one compiler process waits for a program that it started, as for ptxas."""
    world = World(tmp_path, faults=["slow", "compile child"])
    world.env["FAULTS_TIMEOUT"] = "60"  # the run is killed before it kills the candidate, however slow the machine
    kept = set()
    for measurements in (2, 5):
        process = world.start()
        kept |= world.wait_for(measurements)
        end = time.monotonic() + 30
        while not world.pids("child") and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        pids = world.pids("compile", "measure", "child")
        assert world.pids("child") and all(map(gone, pids)), "workers and what they started die with the run"
        assert kept <= world.wait_for(len(kept))
        world.check()
    assert world.ask("SELECT DISTINCT outcome FROM run") == [("running",)], "nobody was left to say how it ended"
    world.finish()


def test_a_worker_that_is_killed_costs_one_candidate_at_most(world):
    """By the system, for its memory, say: at any moment, between two candidates or in one."""
    process = world.start()
    for measurements in (1, 3, 5):
        world.wait_for(measurements)
        os.kill(world.pids("measure")[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (row,) = event_lines.parse(out)[-1]["rows"]
    assert row["tried"] == 7 and row["failed"] <= 3
    reasons = {reason for (reason,) in world.ask("SELECT reason FROM measurement WHERE status = 'runtime'")}
    assert reasons <= {"the worker died (killed by SIGKILL)"}
    world.check()


# --- the disk


@contextlib.contextmanager
def mounted(directory, options):
    """A file system of its own in memory. Skips the test where that may not be made."""
    if os.getuid() or shutil.which("mount") is None:
        pytest.skip("only root can mount a file system")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory):
    """Take all room but a few pages; gives the file that takes it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_a_full_disk_ends_the_run_and_costs_nothing_that_was_recorded(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "size=2m"):
        world = World(disk)
        world.log = tmp_path / "log"
        world.env |= {"FAULTS_LOG": str(world.log), "FAULTS_LOST": str(tmp_path / "lost")}
        process = world.start()
        kept = world.wait_for(3)
        filler = fill(disk)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 4, err
        assert "free disk space" in err and str(world.database) in err
        assert event_lines.parse(out)[-1]["exit_code"] == 4
        assert all(map(gone, world.pids("compile", "measure")))
        filler = fill(disk)  # what the log of the studies took until the run ended, too
        code, _, err = world.run()
        assert code == 4 and "free disk space" in err and "Traceback" not in err, err
        monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(world.database))
        shown = CliRunner().invoke(cli.main, ["show", "--json"])
        assert shown.exit_code == 0, shown.output
        (entry,) = json.loads(shown.stdout)["entries"]
        assert sum(entry["attempts"].values()) >= len(kept), "it can be read all the same"
        filler.unlink()
        assert kept <= world.wait_for(len(kept))
        world.check()
        world.finish()


def test_a_disk_that_is_full_for_the_compiler_is_held_against_no_candidate(tmp_path):
    world = World(tmp_path, faults=["slow", "compiler on a full disk"])
    code, out, err = world.run()
    assert code == 1 and "No space left on device" in err and "what was measured is kept" in err
    assert event_lines.parse(out)[-1]["exit_code"] == 1
    assert all(config["fault"] == "slow" for config in world.searched()), "nothing is known of the other candidates"
    world.finish()


def test_a_gpu_that_is_gone_is_held_against_no_candidate(world):
    process = world.start()
    world.wait_for(3)
    Path(world.env["FAULTS_LOST"]).touch()
    os.kill(world.pids("measure")[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot any more" in err and "no CUDA-capable device" in err
    statuses = [status for (status,) in world.ask("SELECT status FROM measurement")]
    assert statuses.count("runtime") <= 1, "the one that was being measured"
    assert world.ask("SELECT outcome FROM run") == [("failed",)]


def test_a_read_only_mount_is_served_but_not_written(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "size=4m"):
        world = World(disk)
        monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(make(world.database)))
        before = {file.name: file.read_bytes() for file in disk.iterdir()}
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, _, err = world.run()
        assert code == 4 and "cannot be opened" in err and str(world.database) in err and "Traceback" not in err
        assert len(reader.load(world.database, "cuda", 90).entries) == 1
        exported = CliRunner().invoke(cli.main, ["export", "-"])
        assert exported.exit_code == 0 and len(exported.stdout.splitlines()) == 2  # a head and a record
        assert CliRunner().invoke(cli.main, ["freeze", str(tmp_path / "job.db")]).exit_code == 0
        refused = CliRunner().invoke(cli.main, ["freeze", str(disk / "job.db")])
        assert refused.exit_code == 1 and f"{disk / 'job.db'} cannot be written" in refused.stderr
        assert {file.name: file.read_bytes() for file in disk.iterdir()} == before


# --- a database that others hold


def hold(path, pipe, mode):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {mode}")
        pipe.send("held")
        pipe.recv()
        connection.execute("ROLLBACK")


@contextlib.contextmanager
def held(path, mode="IMMEDIATE"):
    """Within the block another process holds the database; it lets go when the block ends."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(path, theirs, mode))
    process.start()
    assert ours.poll(30) and ours.recv() == "held"
    try:
        yield
    finally:
        ours.send("let go")
        process.join()


def test_a_run_whose_database_is_held_too_long_ends_with_what_it_has(world):
    world.env["FAULTS_BUSY"] = "0.5"
    process = world.start()
    kept = world.wait_for(3)
    with held(world.database):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 4 and "is held by another process" in err and "Traceback" not in err
    assert kept <= world.wait_for(len(kept))
    world.finish()


@pytest.mark.slow
def test_a_database_that_is_held_for_twenty_seconds_is_waited_for(world):
    """By all that write, at their start and in a run; exclusively, which is the most that another can do."""
    process = world.start()
    world.wait_for(3)
    shared = world.directory / "shared.jsonl"
    with Store(world.database, read_only=True) as store, shared.open("w") as file:
        records.write(file, transfer.export(store))
    with held(world.database, "EXCLUSIVE"):
        start = time.monotonic()
        other = world.start("import", str(shared))
        time.sleep(20)
        assert process.poll() is None and other.poll() is None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert other.wait(60) == 0, other.stderr.read()
    assert time.monotonic() - start < 29
    world.finish()


def test_the_list_of_faults_names_tests_that_exist():
    """docs/faults.md: `file.py::test_name`, `::test_name` of the same file, with ... or * for the rest of a name."""
    tests, file, named = Path(__file__).parent, None, 0
    for path, name in re.findall(r"`([\w/]+\.py)?(?:::(test_\w+?)(?:\.\.\.|\*)?)?`", FAULTS.read_text()):
        if path and path.startswith(("test_", "tune/", "simulate/", "gpu/")) and "/redzone" not in path:
            file = path
        if name:
            assert re.search(rf"^def {name}", (tests / str(file)).read_text(), re.M), (file, name)
            named += 1
        elif path:
            assert (tests / path).exists() or (tests.parent / "sparsek_tune" / path).exists(), path
    assert named > 40
