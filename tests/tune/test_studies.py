"""The shared studies: claims, the dead, a file that is broken, older, newer or cannot be made."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from types import MappingProxyType

import faults
import pytest
from optuna.trial import TrialState

from sparsek_tune.db.store import Store
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune import EFFORTS, studies, types
from sparsek_tune.tune.board import Board, name_of
from sparsek_tune.tune.studies import Studies, StudiesError, path_beside
from sparsek_tune.tune.suite import Suite, again, tasks
from sparsek_tune.tune.tuner import tune

T, P, D = faults.template(), faults.PROBLEM, faults.DEVICE
C = [Config(tile=16 << i, fault="none") for i in range(4)]


@pytest.fixture
def database(tmp_path):
    return tmp_path / "cache.db"


@pytest.fixture
def two(database):
    """Two processes' views of the same studies."""
    with closing(Studies.beside(database, again)) as one, closing(Studies.beside(database, again)) as other:
        yield one, other


def board(shared, notes=None):
    return Board(shared, D, T, P, [].append if notes is None else notes.append)


def suite_of(shared, templates=MappingProxyType({"fake": T}), problems=(P,)):
    work = tasks(problems, list(templates.values()))
    return Suite.create(shared, D, templates, work, {"effort": "quick", "seed": 0, "until": None})


def until(found, seconds=10.0):
    """What ``found`` gives as soon as that is something."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return value


def test_a_config_is_claimed_once_and_again_when_given_back(two):
    one, other = map(board, two)
    assert one.claim(C[0]) and not other.claim(C[0]) and other.claim(C[1])
    assert one.others() == {C[1]} and other.others() == {C[0]}
    one.drop(C[0])
    assert other.others() == set() and other.claim(C[0])
    other.settle(C[0], "ok", 2.5)
    other.settle(C[1], "infeasible", None)
    found = two[0].trials(two[0].study(name_of(D, T, P)))
    done = {t.user_attrs["claim"]["config"]: t for t in found if t.state == TrialState.COMPLETE}
    assert list(done) == [C[0].key] and done[C[0].key].value == 2.5 and done[C[0].key].params == {"tile": 16}
    assert any(t.user_attrs.get("status") == "infeasible" for t in found)


def test_alone_a_process_need_not_look_at_the_store_again(two):
    one, other = map(board, two)
    assert one.claim(C[0]) and not one.quiet  # nobody knows what was before
    assert one.claim(C[1]) and one.quiet
    assert other.claim(C[2])
    other.settle(C[2], "ok", 1.0)
    assert one.claim(C[3]) and not one.quiet


def test_many_threads_never_hold_one_config_together(database):
    Studies.beside(database).close()
    granted, gate = [], threading.Barrier(4)

    def work():
        with closing(Studies.beside(database)) as shared:
            mine = board(shared)
            gate.wait()
            granted.extend(config for config in C if mine.claim(config))
            gate.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(c["tile"] for c in granted) == [16, 32, 64, 128]


def test_the_claims_of_the_dead_are_free_again(database, monkeypatch):
    monkeypatch.setattr(studies, "INTERVAL", 1)
    monkeypatch.setattr(studies, "GRACE", 2)
    with closing(Studies.beside(database, again)) as alive:
        suite = suite_of(alive)
        dead = Studies.beside(database, again)
        claim, work = Suite(dead, suite.name).take()
        assert board(dead).claim(C[0]) and suite.take() is None
        mine = board(alive)
        time.sleep(4.5)  # heartbeats keep it
        assert mine.others() == {C[0]} and suite.take() is None and not suite.over()
        dead._stop.set()  # as if it were killed
        taken = until(lambda: not suite.over() and not mine.others() and suite.take())
        assert taken[1] == work == (P, ("fake",)) and taken[0] != claim and mine.claim(C[0])


def test_who_was_taken_for_dead_adds_its_problem_no_second_time(database, monkeypatch):
    """As one that was suspended, whose claim others have failed and put up again."""
    monkeypatch.setattr(studies, "INTERVAL", 1)
    monkeypatch.setattr(studies, "GRACE", 2)
    with closing(Studies.beside(database, again)) as alive:
        suite = suite_of(alive)
        suspended = Studies.beside(database, again)
        claim, _ = Suite(suspended, suite.name).take()
        suspended._stop.set()
        waiting = until(lambda: not suite.over() and alive.trials(suite._study, TrialState.WAITING))
        assert not suspended.finish(claim, 1.0) and suspended._held == {}
        suspended._held[claim] = suite._study  # it had not come so far
        suspended.close()
        assert alive.trials(suite._study, TrialState.WAITING) == waiting and len(waiting) == 1


def test_a_claim_whose_process_was_killed_in_the_making_is_free_again(two, monkeypatch):
    monkeypatch.setattr(studies, "GRACE", 1)
    dead, mine = map(board, two)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(dead._studies._storage, "record_heartbeat", raiser(KeyboardInterrupt()))
        dead.claim(C[0])
    assert not mine.claim(C[0]) and mine.others() == {C[0]}
    assert mine.claim(C[1]) and not mine.quiet  # as long as others may work at something
    time.sleep(1.1)
    assert mine.others() == set() and mine.claim(C[0])
    assert board(two[0]).others() == {C[0], C[1]}


def test_who_was_taken_for_dead_in_the_making_does_not_hold_the_claim(two, monkeypatch):
    monkeypatch.setattr(studies, "GRACE", 0.2)
    slow, mine = map(board, two)
    real = slow._studies._storage.record_heartbeat

    def late(trial):
        assert mine.others() == {C[0]}
        time.sleep(0.3)
        assert mine.others() == set() and mine.claim(C[0])
        real(trial)

    monkeypatch.setattr(slow._studies._storage, "record_heartbeat", late)
    assert not slow.claim(C[0]) and slow.others() == {C[0]}


def raiser(error):
    def call(*_):
        raise error

    return call


def test_what_is_closed_gives_its_claims_back(two):
    suite = suite_of(two[0])
    other = Suite(two[1], suite.name)
    assert other.take() is not None and board(two[1]).claim(C[0]) and suite.take() is None
    two[1].close()
    assert suite.take() is not None and board(two[0]).others() == set()
    suite.withdraw()
    two[0].close()
    with closing(Studies(two[0].url, again)) as third:
        assert Suite.joinable(third, D, {"fake": T}) == []  # withdrawn: nobody goes on with it


def test_looking_for_suites_does_not_cost_more_with_every_run_there_was(two, monkeypatch):
    looked, real = [], Studies.trials
    for _ in range(3):
        suite_of(two[0]).withdraw()
    suite = suite_of(two[0])
    monkeypatch.setattr(
        Studies, "trials", lambda self, study, *states: looked.append(study) or real(self, study, *states)
    )
    assert [found.name for found in Suite.joinable(two[1], D, {"fake": T})] == [suite.name]
    assert looked == [suite._study]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(EFFORTS, "tiny", types.Effort(40, 60.0, 0.01, 3, 0.01, 4, 2, timeout=3.0))


def go(database, notes):
    with Store(database) as store:
        see = lambda event: notes.append(event.message) if event.kind == "note" else None  # noqa: E731
        return tune([P], D, store, effort="tiny", templates={"fake": T}, factory=faults.FACTORY, on_event=see)


def _newer(path):
    Studies.beside(path.with_name("cache.db")).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0'")


def _other_tables(path):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE studies (x)")


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"no database" * 1000), _newer, _other_tables])
def test_a_file_of_no_use_is_put_aside(database, tiny, spoil):
    path = path_beside(database)
    spoil(path)
    before, notes = path.read_bytes(), []
    (row,) = go(database, notes)
    assert row.config == C[3] and notes == []
    assert path.with_name("cache.studies.db.old").read_bytes() == before
    with closing(Studies.beside(database)) as shared:
        assert name_of(D, T, P) in shared.all()


def test_without_studies_a_process_goes_on_by_itself(database, tiny):
    path_beside(database).mkdir()
    (path_beside(database) / "file").touch()
    path_beside(database).with_name("cache.studies.db.old").mkdir()
    (path_beside(database).with_name("cache.studies.db.old") / "file").touch()
    notes = []
    (row,) = go(database, notes)
    assert row.config == C[3] and len(notes) == 1 and "works by itself" in notes[0]


def test_studies_that_break_in_the_middle_stop_nothing(database, tiny, monkeypatch):
    real, calls = Studies.add, []

    def add(self, study, state, *rest):
        calls.append(state)
        if len(calls) > 3:
            raise StudiesError("the studies are gone")
        return real(self, study, state, *rest)

    monkeypatch.setattr(Studies, "add", add)
    notes = []
    (row,) = go(database, notes)
    assert row.config == C[3] and row.tried == 4
    assert notes == ["the studies are gone; this process goes on by itself"]


def test_devices_sources_and_spaces_have_studies_of_their_own():
    import dataclasses

    names = {
        name_of(D, T, P),
        name_of(dataclasses.replace(D, driver="other"), T, P),
        name_of(D, faults.template(tiles=(16, 64)), P),
        name_of(D, faults.template("other"), P),
        name_of(D, T, P._replace(n=2048)),
    }
    assert len(names) == 5 and name_of(D, T, P._replace(gate="v")) in names


def test_every_kernel_belongs_to_the_first_problem_that_needs_it():
    one, two = faults.template("one", fields=("n",)), faults.template("two")
    other = P._replace(d=128)
    assert tasks([P, other, P._replace(k=8)], [one, two]) == [(P, ("one", "two")), (other, ("two",))]


def test_of_three_that_claim_one_config_the_first_has_it(two, monkeypatch):
    first, mine = map(board, two)
    assert first.claim(C[0])
    real = two[1].take

    def take(study, trial):
        two[0].add(study, {"claim": {"config": C[0].key}})  # a third one, later than ours
        return real(study, trial)

    monkeypatch.setattr(two[1], "take", take)
    assert not mine.claim(C[0])


def test_a_file_that_is_only_busy_is_not_put_aside(database, monkeypatch):
    Studies.beside(database).close()
    monkeypatch.setattr(studies, "_BUSY_SECONDS", 0.1)
    path = path_beside(database)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")  # as on a network file system
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StudiesError):
            Studies.beside(database)
    assert path.exists() and not path.with_name("cache.studies.db.old").exists()


def test_a_transaction_begins_as_a_writer(two):
    """One that began as a reader would be refused where another process wrote meanwhile, however long it waited."""
    path = two[0].url.removeprefix("sqlite:///")
    with two[0]._storage.engine.begin() as connection, closing(sqlite3.connect(path, timeout=0)) as other:
        connection.exec_driver_sql("SELECT * FROM studies")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_no_password_shows():
    with pytest.raises(StudiesError) as error:
        Studies("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "me:***@127.0.0.1" in str(error.value) and "secret" not in str(error.value)


def test_a_problem_at_which_three_processes_died_is_given_up(two):
    suite = suite_of(two[0])
    for _ in range(3):
        claim, _ = suite.take()
        suite.give_back(claim)
    assert suite.take() is None and suite.over() and suite.rows() == []


def test_what_lies_ahead_is_counted_in_kernels(two):
    more, other = faults.template("more", fields=("n",)), P._replace(d=128)
    suite = suite_of(two[0], {"fake": T, "more": more}, [P, other])
    assert suite.ahead() == (3, 1)  # two of the first problem and one of the second; nobody drives: as if one did
    suite.take()
    assert suite.ahead() == (1, 1) and not suite.over()
    Suite(two[1], suite.name).take()
    assert suite.ahead() == (0, 2) and not suite.over()


def test_the_log_of_a_file_that_was_put_aside_is_not_the_new_ones(database):
    path = path_beside(database)
    wal = path.with_name(path.name + "-wal")
    with closing(Studies.beside(database)) as shared:
        shared.study("old")
        left = wal.read_bytes()
    path.write_bytes(b"no database" * 1000)
    wal.write_bytes(left)
    with closing(Studies.beside(database)) as shared:
        assert shared.all() == {}


def test_a_problem_of_a_suite_that_was_withdrawn_waits_no_more(two):
    suite = suite_of(two[0])
    claim, _ = suite.take()
    suite.withdraw()
    suite.give_back(claim)
    assert suite.take() is None and suite.over()


def test_suites_of_other_values_of_a_parameter_are_not_joined(two):
    wider = faults.template(tiles=(16, 4096))
    assert wider.source_hash == T.source_hash and wider.size != T.size
    suite_of(two[0])
    assert Suite.joinable(two[1], D, {"fake": T}) and not Suite.joinable(two[1], D, {"fake": wider})


def test_what_waits_in_a_suite_that_is_withdrawn_is_taken_by_nobody(two):
    suite = suite_of(two[0])
    other = Suite(two[1], suite.name)
    suite.withdraw()
    assert other.take() is None and other.over() and suite.rows() == []


def test_on_a_network_file_system_the_studies_have_no_log(tmp_path, monkeypatch):
    for network, mode in ((True, "delete"), (False, "wal")):
        monkeypatch.setattr("sparsek_tune.db.sqlite.is_network", lambda path, network=network: network)
        database = tmp_path / f"{mode}.db"
        Studies.beside(database).close()
        with closing(sqlite3.connect(path_beside(database))) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == (mode,)
