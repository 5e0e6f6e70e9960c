"""Many processes at one file, shipped configs, and what reading loads."""

import json
import os
import subprocess
import sys
import time

import pytest
from database import CONFIG, DEVICE, FORK, PROBLEM, TEMPLATE, add, count, execute

from sparsek_tune.db import reader, sqlite
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Device

# --- many processes


def write_many(path, start, number):
    """Measure and serve; the times of the race tell which measurement won it."""
    start.wait()
    with Store(path) as store:
        run = store.start_run(f"writer {number}")
        for i in range(12):
            config = Config(BLOCK=16, i=i, by=number)
            measurement = add(store, run=run, config=config)
            assert store.set_winner(measurement, 1000.0 + number, 1.0 + i)
            static = add(store, Measured("static"), run=run, config=config)
            assert not store.set_winner(static), "nothing static replaces what was measured"
            failed = add(store, Measured("wrong", reason="nan"), run=run, config=config)
            with pytest.raises(ValueError, match="is wrong"):
                store.set_winner(failed)
        store.finish_run(run)


@pytest.mark.parametrize("network", [False, True])
def test_sixteen_processes_that_write_at_once_lose_nothing(path, monkeypatch, network):
    monkeypatch.setattr(sqlite, "is_network", lambda path: network)
    writers, each = 16, 12
    start = FORK.Barrier(writers)
    processes = [FORK.Process(target=write_many, args=(path, start, i)) for i in range(writers)]
    for process in processes:
        process.start()
    served = set()
    while any(process.is_alive() for process in processes):
        found = reader.load(path, "cuda", 90)
        assert not found.broken, found.reason
        served |= {(entry.config, entry.default_ms, entry.tuned_ms, entry.static) for entry in found.entries}
        time.sleep(0.01)
    assert [p.exitcode for p in processes] == [0] * writers
    assert count(path) == writers * each * 3
    with Store(path) as store:
        kept = store.measurements(DEVICE, TEMPLATE, PROBLEM)
        (winner,) = store.winners()
    assert len({m.id for m in kept}) == len(kept) == writers * each * 3
    found = {(m.config["by"], m.config["i"], m.result.status) for m in kept}
    assert found == {(w, i, s) for w in range(writers) for i in range(each) for s in ("ok", "static", "wrong")}
    assert execute(path, "SELECT count(*), count(DISTINCT id), count(DISTINCT pid) FROM run") == [(writers,) * 3]
    assert execute(path, "SELECT DISTINCT outcome FROM run") == [("done",)]
    served.add((winner.config, winner.default_ms, winner.tuned_ms, winner.static))
    for key, default_ms, tuned_ms, static in served:  # whoever looked at whatever moment saw one race, not parts of two
        config = Config.from_key(key)
        assert (default_ms, tuned_ms, static) == (1000.0 + config["by"], 1.0 + config["i"], False)


def write_until_killed(path, pipe):
    with Store(path) as store:
        run = store.start_run("to be killed")
        while True:
            pipe.send(add(store, run=run))


def test_a_process_killed_while_it_writes_costs_nothing_that_was_recorded(path):
    for _ in range(3):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=write_until_killed, args=(path, theirs))
        process.start()
        told = [ours.recv() for _ in range(10)]
        process.kill()
        process.join()
        theirs.close()
        while ours.poll():
            try:
                told.append(ours.recv())
            except EOFError:
                break
        with Store(path) as store:
            kept = {m.id for m in store.measurements(DEVICE, TEMPLATE, PROBLEM)}
            add(store)
        assert set(told) <= kept
        assert count(path) == len(kept) + 1


def test_a_store_goes_on_in_both_processes_after_a_fork(path):
    with Store(path) as store:
        run = store.start_run("parent")
        add(store, run=run)

        def child():
            for _ in range(20):
                add(store, run=run)

        process = FORK.Process(target=child)
        process.start()
        for _ in range(20):
            add(store, run=run)
        process.join()
        assert process.exitcode == 0
        assert len(store.measurements(DEVICE, TEMPLATE, PROBLEM)) == 41
    assert count(path) == 41


def test_no_connection_outlives_a_call(path):
    with Store(path) as store:
        add(store)
        held = subprocess.run(["ls", "-l", f"/proc/{os.getpid()}/fd"], capture_output=True, text=True).stdout
        assert "->" in held
        assert str(path) not in held


# --- shipped configs


def shipped_document(**change):
    entry = reader.Entry("forward", "0" * 16, DEVICE, PROBLEM, CONFIG.key, 0.3, 0.2, False, "2026-01-01T00:00:00+00:00")
    return {**reader.document([entry]), **change}, entry._replace(shipped=True)


def test_shipped_configs_come_back_as_they_were_written(tmp_path):
    document, entry = shipped_document()
    (tmp_path / "gpu_a.json").write_text(json.dumps(document))
    assert reader.load_shipped("cuda", 90, tmp_path) == reader.Winners((entry,))
    assert reader.load_shipped("cuda", 80, tmp_path) == reader.Winners(())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps(shipped_document(format=2)[0]),
        json.dumps(shipped_document(device={"kind": "cuda"})[0]),
        json.dumps(shipped_document(winners=[{"template": "forward"}])[0]),
    ],
)
def test_one_bad_shipped_file_is_named_and_does_not_take_the_others_along(tmp_path, text):
    document, entry = shipped_document()
    (tmp_path / "a_bad.json").write_text(text)
    (tmp_path / "b_good.json").write_text(json.dumps(document))
    found = reader.load_shipped("cuda", 90, tmp_path)
    assert (found.entries, found.broken) == ((entry,), True)
    assert "a_bad.json" in found.reason


def test_the_package_ships_only_files_that_can_be_read():
    for cc in (80, 86, 89, 90, 100, 120):
        assert reader.load_shipped("cuda", cc).reason == ""


def test_a_document_is_of_one_device():
    _, entry = shipped_document()
    other = entry._replace(device=Device("cuda", 90, "GPU B", 1, 1))
    with pytest.raises(ValueError, match="of one device, but are of 2"):
        reader.document([entry, other])


def test_reading_loads_the_standard_library_only():
    code = "import sys, sparsek_tune.db.reader; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sqlite3" in loaded
    assert not {"sqlalchemy", "optuna", "click", "torch", "triton", "numpy"} & set(loaded)
