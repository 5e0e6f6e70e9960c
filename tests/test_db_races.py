"""Races are facts: what is served depends on those that are known, not on when they became known."""

import io
import itertools
import json
import lzma
from pathlib import Path

import pytest
from database import CONFIG, OK, add, count, execute, make
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_tune.db import errors, races, records, transfer
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Config

A, B, C = Config(BLOCK=16, STAGES=1), Config(BLOCK=32, STAGES=2), Config(BLOCK=64, STAGES=3)
STATIC = Measured("static", 0.001)
RELEASED = Path(__file__).parent / "data" / "schema-0001.db.xz"


def race(store, config, tuned_ms, result=OK, run=None):
    return store.set_winner(add(store, result, run, config), None if result is STATIC else 0.3, tuned_ms)


def served(store):
    return [(w.config, w.default_ms, w.tuned_ms, w.static) for w in store.winners()]


def ends(folder, exports):
    """What databases serve that took ``exports`` in every order (of many, in some)."""
    found = []
    for i, order in enumerate(
        itertools.islice(itertools.permutations(exports), 0, None, max(1, len(exports) ** 2 // 4))
    ):
        if i == 4:
            break
        with Store(folder / f"end{len(list(folder.iterdir()))}.db") as store:
            for taken in (*order, order[0]):
                transfer.add(store, taken)
            found.append(served(store))
    with Store(folder / "together.db") as store:
        transfer.add(store, [record for export in reversed(exports) for record in export])
        found.append(served(store))
    return found


def version_1(found):
    """Records as version 1 wrote them, read by this one."""
    lines = [records.HEADER | {"version": 1}, *({k: v for k, v in r.items() if k != "races"} for r in found)]
    return records.read(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), "old.jsonl")


DATABASES = st.sampled_from([0, 1])
RACE = st.tuples(
    st.just("race"),
    DATABASES,
    st.sampled_from([A, B, C]),
    st.sampled_from([0.2, 0.25, 0.29]),
    st.sampled_from([OK, STATIC]),
)
SHARE = st.tuples(st.just("share"), DATABASES)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.one_of(RACE, SHARE), min_size=2, max_size=6))
def test_imports_in_any_order_give_the_same_winners(tmp_path_factory, acts):
    """Two databases race and take over from each other; every state that they were ever in is exported."""
    folder = tmp_path_factory.mktemp("order")
    with Store(folder / "0.db") as one, Store(folder / "1.db") as two:
        stores, exports = (one, two), ([], [])
        for kind, i, *what in acts:
            if kind == "race":
                done = race(stores[i], *what)
                assert done == (served(stores[i])[0][0] == what[0].key) or not done
            else:
                transfer.add(stores[i], transfer.export(stores[1 - i]))
            exports[i].append(transfer.export(stores[i]))
        last = [served(store) for store in stores]
    for i, (of_one, wanted) in enumerate(zip(exports, last, strict=True)):
        if of_one:
            (folder / f"of{i}").mkdir()
            assert all(end == wanted for end in ends(folder / f"of{i}", of_one)), "as the database itself"
    (folder / "both").mkdir()
    assert len(set(map(str, ends(folder / "both", [*exports[0], *exports[1]])))) == 1


@pytest.mark.parametrize("old_version", [False, True])
def test_old_and_new_exports_of_a_problem_that_was_raced_again(path, tmp_path, old_version):
    """The first race had flattered its winner."""
    with Store(path) as store:
        race(store, A, 0.1)
        old = transfer.export(store)
        race(store, B, 0.29)
        new = transfer.export(store)
    if old_version:
        old, new = version_1(old), version_1(new)
    assert set(map(str, ends(tmp_path, [old, new]))) == {str([(B.key, 0.3, 0.29, False)])}


def test_what_one_database_replaced_another_may_still_have_better_evidence_for(path, tmp_path):
    with Store(path) as here, Store(tmp_path / "there.db") as there:
        race(here, A, 0.1)
        race(there, C, 0.2)
        race(here, B, 0.29)
        report = transfer.add(here, transfer.export(there))
        assert served(here) == [(C.key, 0.3, 0.2, False)] and report.winners == 1
        assert [(c.served, c.other) for c in report.conflicts] == [(C.key, B.key)], "A is out of the contest"
        race(here, A, 0.28)
        assert served(here) == [(A.key, 0.3, 0.28, False)], "whoever races knows what is there"
        assert transfer.add(here, transfer.export(there)) == transfer.Report(0, 1, 0, ())
        transfer.add(there, transfer.export(here))
        assert served(there) == served(here)


def test_a_copy_of_version_1_brings_nothing_back_that_was_replaced_since(path):
    path.write_bytes(lzma.decompress(RELEASED.read_bytes()))
    with records.open_text(RELEASED.with_name("schema-0001.jsonl.xz")) as file:
        old = records.read(file, "old")
    flattered = max((r for r in old if r["winner"] and r["status"] == "ok"), key=lambda r: r["created_at"])
    with Store(path) as store:
        assert transfer.export(store) == old
        before = store.winners()
        (measurement, problem), *_ = execute(
            path, f"SELECT id, problem_id FROM measurement WHERE created_at = '{flattered['created_at']}'"
        )
        others = execute(path, f"SELECT id FROM measurement WHERE problem_id = {problem} AND status = 'ok'")
        again = next((i for (i,) in others if i != measurement), measurement)
        store.set_winner(again, 0.3, 0.299)
        after = store.winners()
        assert after != before
        assert transfer.add(store, old) == transfer.Report(0, len(old), 0, ()) and store.winners() == after


def test_a_clock_that_is_ahead_does_not_keep_a_race_from_being_replaced(path, tmp_path):
    with Store(path) as store:
        race(store, A, 0.1)
        (ahead,) = transfer.export(store)
    ahead["races"][0]["created_at"] = "2999-01-01T00:00:00.999999+00:00"
    with Store(tmp_path / "other.db") as store:
        transfer.add(store, [ahead])
        for config in (B, C):
            race(store, config, 0.29)
            assert served(store) == [(config.key, 0.3, 0.29, False)]
        assert sorted(moment for (moment,) in execute(store.path, "SELECT created_at FROM race"))[1:] == [
            "2999-01-01T00:00:01.000000+00:00", "2999-01-01T00:00:01.000001+00:00",
        ]  # fmt: skip


def test_what_is_static_yields_to_what_was_measured_in_either_order(path, tmp_path):
    with Store(path) as static, Store(tmp_path / "measured.db") as measured:
        race(static, A, None, STATIC)
        race(measured, B, 0.31)
        exports = [transfer.export(static), transfer.export(measured)]
        race(static, C, None, STATIC)
        exports.append(transfer.export(static))
    assert set(map(str, ends(tmp_path, exports))) == {str([(B.key, 0.3, 0.31, False)])}


def test_a_race_that_is_told_twice_is_one(path):
    with Store(path) as store:
        m = add(store)
        assert store.set_winner(m, 0.3, 0.2) and store.set_winner(m, 0.3, 0.2)
        assert execute(path, "SELECT count(*) FROM race") == [(1,)]
        assert store.set_winner(m, 0.3, 0.25), "another race of one measurement"
        assert served(store) == [(CONFIG.key, 0.3, 0.25, False)]
        assert execute(path, "SELECT count(*) FROM race") == [(2,)]


@pytest.mark.parametrize("change", ["UPDATE race SET tuned_ms = 0.1", "DELETE FROM race"])
def test_races_cannot_be_changed(path, change):
    make(path)
    with pytest.raises(Exception, match="append-only"):
        execute(path, change)


def test_races_know_those_that_they_replaced_alone(path):
    """So what a race holds does not grow with the number of races before it."""
    with Store(path) as store:
        for i in range(5):
            race(store, Config(BLOCK=16, STAGES=i), 0.2, run=store.start_run(f"run {i}"))
        found = transfer.export(store)
    assert [len(r["races"][0]["known"]) for r in found] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_an_older_file_that_may_only_be_read_is_shown_as_today_and_stays(path, tmp_path, journal):
    path.write_bytes(lzma.decompress(RELEASED.read_bytes()))
    assert execute(path, f"PRAGMA journal_mode = {journal}") == [(journal,)]
    before = path.read_bytes()
    with Store(tmp_path / "ours.db") as ours, Store(path, read_only=True) as other:
        found = transfer.export(other)
        assert sum(len(r["races"]) for r in found) == sum(r["winner"] is not None for r in found) > 1
        transfer.add(ours, found)
        assert ours.winners() == other.winners() and len(ours.summary()) == len(other.summary())
        with pytest.raises(errors.ReadOnlyError):
            add(other)
    assert path.read_bytes() == before
    frozen = tmp_path / "job.db"
    transfer.freeze(path, frozen)
    with Store(frozen, read_only=True) as store:
        assert transfer.export(store) == found
    assert count(path) == len(found)


def made(n, created_at, run, known, **changed):
    base = races.Race(
        n, "{}", False, 0.1, "", ("h", run, ""), 0.3, 0.2, created_at, frozenset(("h", k, "") for k in known)
    )
    return base._replace(**changed)


def test_a_race_stands_unless_a_later_one_knew_its_run():
    first, second, other = made(1, "1", 1, [1], tuned_ms=0.1), made(2, "2", 2, [1, 2]), made(3, "1", 3, [3])
    assert races.standing([first]) == [first]
    assert [r.measurement for r in races.standing([first, second, other])] == [3, 2]
    assert races.standing([second, made(4, "2", 1, [1], tuned_ms=0.1)])[0].measurement == 4, "at one moment both stand"
    assert races.standing([first, made(5, "9", 9, [1], static=True)]) == [first], "static ones replace nothing measured"


MADE = st.builds(
    lambda n, created_at, run, known, tuned, static: made(
        n, created_at, run, {run, *known}, tuned_ms=tuned, static=static
    ),
    st.integers(1, 3),
    st.sampled_from("1234"),
    st.integers(1, 3),
    st.sets(st.integers(1, 3)),
    st.sampled_from([0.1, 0.2, 0.25]),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(MADE, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_what_stands_depends_on_the_set_of_races_alone(found, random):
    shuffled = random.sample(found, len(found))
    assert [r.strength for r in races.standing(shuffled)] == [r.strength for r in races.standing(found)]
    assert races.standing(found), "the latest race always stands"


def test_the_latest_race_that_knew_a_run_counts_in_whatever_order_they_are_told():
    known, again, late = made(1, "1", 2, [1, 2]), made(2, "2", 1, [1], tuned_ms=0.1), made(3, "3", 3, [1, 3])
    for order in itertools.permutations([known, again, late]):
        assert [r.measurement for r in races.standing(order)] == [3, 1]


def test_a_record_that_stands_twice_in_a_file_is_one_race(path, tmp_path):
    with Store(make(path), read_only=True) as store:
        found = transfer.export(store)
    with Store(tmp_path / "other.db") as other:
        transfer.add(other, [*found, *found])
        assert execute(other.path, "SELECT count(*) FROM race") == [(1,)]
        assert transfer.export(other) == found
