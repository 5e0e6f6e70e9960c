"""Records from one database to another: nothing lost, nothing twice, the better evidence served, bad files refused."""

import copy
import hashlib
import io
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import pytest
from database import CONFIG, DEVICE, OK, PROBLEM, TEMPLATE, add, count, execute, make, unprivileged
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_tune.db import reader, records, transfer
from sparsek_tune.db.errors import CorruptError, DatabaseError, MissingError, ReadOnlyError, SnapshotError
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates.base import Config


def exported(path):
    with Store(path, read_only=True) as store:
        return transfer.export(store)


def taken(path, found):
    with Store(path) as store:
        return transfer.add(store, found)


def text(found):
    file = io.StringIO()
    assert records.write(file, found) == len(found)
    return file.getvalue()


def parsed(words):
    return records.read(io.StringIO(words), "shared.jsonl")


def a_race(path, config, default_ms, tuned_ms, result=OK, device=DEVICE):
    """A database with one winner."""
    with Store(path) as store:
        store.set_winner(add(store, result, config=config, device=device), default_ms, tuned_ms)
    return exported(path)


A, B, C = Config(BLOCK=16, STAGES=1), Config(BLOCK=32, STAGES=2), Config(BLOCK=64, STAGES=3)


def served(path):
    with Store(path, read_only=True) as store:
        return [(w.config, w.default_ms, w.tuned_ms, w.static) for w in store.winners()]


def test_a_file_of_records_gives_the_database_back(path, tmp_path):
    with Store(path) as store:
        run = store.start_run("sparsek-tune run --effort quick")
        store.set_winner(add(store, run=run), 0.3, 0.2)
        add(store, Measured("wrong", reason="error 0.3 in \u00e4\u2028\n"), run, B)
        store.finish_run(run)
        add(store, Measured("static", 1.5), config=A, device=replace(DEVICE, name="target cuda:90"))
    other = tmp_path / "other.db"
    report = taken(other, parsed(text(exported(path))))
    assert report == transfer.Report(3, 0, 1, ())
    assert exported(other) == exported(path) and served(other) == served(path)
    with Store(other) as store:
        (first, second) = store.measurements(DEVICE, TEMPLATE, PROBLEM)
        assert (first.config, first.result) == (CONFIG, OK) and second.result.status == "wrong"


def test_what_is_there_is_passed_over(path, tmp_path):
    found = exported(make(path))
    assert taken(path, found) == transfer.Report(0, 1, 0, ())
    other = tmp_path / "other.db"
    assert [taken(other, found)[:2] for _ in range(3)] == [(1, 0), (0, 1), (0, 1)]
    assert count(other) == 1 and exported(other) == found


def test_a_run_that_was_exported_while_it_ran_gets_its_end(path, tmp_path):
    with Store(path) as store:
        run = store.start_run("sparsek-tune run")
        add(store, run=run)
        early = transfer.export(store)
        store.finish_run(run, "interrupted")
    other = tmp_path / "other.db"
    taken(other, early)
    taken(other, exported(path))
    taken(other, early)
    assert execute(other, "SELECT outcome, finished_at IS NULL FROM run") == [("interrupted", 0)]


def test_the_higher_speed_up_is_served_and_the_conflict_told(path, tmp_path):
    a_race(path, A, 0.30, 0.25)
    better, worse = a_race(tmp_path / "b.db", B, 0.30, 0.20), a_race(tmp_path / "c.db", C, 0.30, 0.29)
    (conflict,) = taken(path, better).conflicts
    assert conflict.served == B.key and conflict.other == A.key and conflict.problem == PROBLEM._replace(k=0)
    assert (conflict.served_speedup, conflict.other_speedup) == pytest.approx((1.5, 1.2))
    report = taken(path, worse)
    assert report.winners == 0 and report.conflicts[0][3:5] == (B.key, pytest.approx(1.5))
    assert served(path) == [(B.key, 0.30, 0.20, False)] and count(path) == 3


def test_one_config_that_won_twice_is_no_conflict(path, tmp_path):
    a_race(path, A, 0.3, 0.25)
    report = taken(path, a_race(tmp_path / "b.db", A, 0.3, 0.2))
    assert report == transfer.Report(1, 0, 1, ()) and served(path) == [(A.key, 0.3, 0.2, False)]


def test_measured_stands_before_static(path, tmp_path):
    a_race(path, A, None, None, Measured("static", 0.001))
    taken(path, a_race(tmp_path / "b.db", B, 0.3, 0.3))
    assert served(path) == [(B.key, 0.3, 0.3, False)]
    taken(path, a_race(tmp_path / "c.db", C, 9.0, 1.0, Measured("static", 0.001)))
    assert served(path) == [(B.key, 0.3, 0.3, False)]


def test_an_older_copy_does_not_bring_an_earlier_winner_back(path):
    old = a_race(path, A, 0.3, 0.2)
    with Store(path) as store:  # raced again: the first race had flattered it
        store.set_winner(add(store, config=B), 0.3, 0.29)
    taken(path, old)
    assert served(path) == [(B.key, 0.3, 0.29, False)]


RACES = st.tuples(
    st.sampled_from([A, B, C]), st.sampled_from([0.2, 0.25, 0.3]), st.sampled_from([0.002, 0.02]), st.booleans()
)


@settings(max_examples=15, deadline=None)
@given(st.lists(RACES, min_size=2, max_size=3))
def test_the_order_of_files_does_not_matter(tmp_path_factory, races):
    folder = tmp_path_factory.mktemp("order")
    files = []
    for i, (config, tuned, width, static) in enumerate(races):
        result = Measured("static" if static else "ok", tuned, tuned - width / 2, tuned + width / 2, 9)
        files.append(a_race(folder / f"{i}.db", config, 0.3, tuned, result))
    ends = set()
    for i, order in enumerate(itertools.permutations(files)):
        for found in order:
            taken(folder / f"end{i}.db", found)
        ends.add(tuple(served(folder / f"end{i}.db")))
    assert len(ends) == 1


def test_a_failure_in_the_middle_takes_nothing(path, tmp_path):
    found = exported(make(tmp_path / "other.db"))
    bad = copy.deepcopy(found[0]) | {"created_at": "2026-01-01T00:00:00.000000+00:00", "samples": 1 << 70}
    with pytest.raises((DatabaseError, OverflowError)):
        taken(path, [*found, bad])
    assert count(path) == 0 and execute(path, "SELECT count(*) FROM run") == [(0,)]


def test_a_winner_that_was_chosen_after_the_first_export_is_served(path, tmp_path):
    with Store(path) as store:
        m = add(store)
        early = transfer.export(store)
        store.set_winner(m, 0.3, 0.2)
        late = transfer.export(store)
    for i, order in enumerate(((early, late), (late, early), ([*early, *late],))):
        for found in order:
            taken(tmp_path / f"{i}.db", found)
        assert served(tmp_path / f"{i}.db") == [(CONFIG.key, 0.3, 0.2, False)]


def test_the_order_of_fields_does_not_matter(path, tmp_path):
    record = exported(make(tmp_path / "other.db"))[0]
    problem = record["problem"] | {"n": 16, "rows": 8}
    swapped = dict(reversed((problem | {"n": 8, "rows": 16}).items()))
    others = [
        record | {"problem": p, "created_at": f"2026-01-01T00:00:00.00000{i}+00:00"}
        for i, p in enumerate((problem, swapped))
    ]
    taken(path, others)
    assert [(r["problem"]["n"], r["problem"]["rows"]) for r in exported(path)] == [(16, 8), (8, 16)]


@pytest.mark.parametrize(
    ("weaker", "stronger"),
    [
        ({"ci_low_ms": 0.1}, {"ci_low_ms": 0.19}),
        ({"created_at": "2026-01-01T00:00:00.000000+00:00"}, {"created_at": "2026-01-02T00:00:00.000000+00:00"}),
        ({"ci_low_ms": 0.1, "created_at": "2027-01-02T00:00:00.000000+00:00"}, {"ci_low_ms": 0.19}),
        ({"races": [{"default_ms": 0.3, "tuned_ms": 0.25}], "ci_low_ms": 0.199}, {}),
    ],
)
@pytest.mark.parametrize("turn", [1, -1])
def test_what_makes_evidence_better(path, tmp_path, weaker, stronger, turn):
    base = exported(make(tmp_path / "other.db"))[0] | {"created_at": "2026-01-01T00:00:00.000000+00:00"}
    two = base | {"config": dict(A)} | weaker, base | {"config": dict(B)} | stronger
    two[0]["races"] = [base["races"][0] | race for race in two[0]["races"]]
    report = taken(path, two[::turn])
    assert [w[0] for w in served(path)] == [B.key]
    assert [(c.served, c.other) for c in report.conflicts] == [(B.key, A.key)]


def test_what_tells_measurements_apart(path, tmp_path):
    base = exported(make(tmp_path / "other.db", winner=False))[0]
    wrong = {"status": "wrong", "median_ms": None, "ci_low_ms": None, "ci_high_ms": None}
    others = [base, base | wrong, base | {"run": base["run"] | {"pid": 1}}, base | {"config": dict(A)}, base]
    assert taken(path, others)[:2] == (4, 1)
    assert execute(path, "SELECT count(*) FROM run") == [(2,)]


def test_a_command_without_end_can_be_exported_and_taken(path, tmp_path):
    with Store(path) as store:
        add(store, Measured("wrong", reason="r" * 9000), store.start_run("x" * 9000))
    assert taken(tmp_path / "other.db", parsed(text(exported(path)))).added == 1


def test_many_records_are_quick(path, tmp_path):
    base = exported(make(tmp_path / "other.db"))[0]
    many = [base | {"created_at": f"2026-01-01T00:00:00.{i:06}+00:00", "winner": None} for i in range(20000)]
    begun = time.monotonic()
    assert taken(path, many).added == 20000 and taken(path, many).known == 20000
    assert time.monotonic() - begun < 25  # it took minutes when every record was looked up


# --- files that are not right


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return exported(make(tmp_path_factory.mktemp("record") / "cache.db"))[0]


def test_what_a_server_cannot_hold_is_not_kept_of_a_reason(record, path):
    failed = {**record, "status": "runtime", "reason": "a\0b", "races": [], "winner": None, "samples": 0}
    failed |= dict.fromkeys(("median_ms", "ci_low_ms", "ci_high_ms"))
    with Store(path) as store:
        transfer.add(store, parsed(text([failed])))
    assert [r["reason"] for r in exported(path)] == ["a\N{REPLACEMENT CHARACTER}b"]


def test_the_record_itself_is_right(record):
    assert parsed(text([record])) == [record]


RUN = {
    "command": "", "host": "", "pid": 1, "outcome": "done", "started_at": "2026-01-01T00:00:00.000000+00:00",
    "finished_at": None,
}  # fmt: skip
RACE = {"default_ms": 0.3, "tuned_ms": 0.2, "created_at": "2026-01-01T00:00:00.000000+00:00", "known": []}
FAILED = {"status": "wrong", "median_ms": None, "ci_low_ms": None, "ci_high_ms": None}
CHANGES = {
    "no time": ({"median_ms": None, "ci_low_ms": None, "ci_high_ms": None}, "median_ms: must be a time"),
    "a time below zero": ({"median_ms": -1.0}, r"\$\.median_ms: -1.0 is less"),
    "text for a time": ({"median_ms": "0.2"}, r"\$\.median_ms"),
    "an interval without the median": ({"ci_low_ms": 0.5}, "must ascend"),
    "a failure with times": ({"status": "wrong", "winner": None}, "neither times nor won"),
    "a failure that won": ({"status": "wrong", "median_ms": None, "ci_low_ms": None, "ci_high_ms": None}, "nor won"),
    "an unknown status": ({"status": "fast"}, r"\$\.status"),
    "one field more": ({"exec": "rm"}, "exec"),
    "a float for a count": ({"samples": 1.0}, r"\$\.samples"),
    "true for a count": ({"samples": True}, r"\$\.samples"),
    "a count beyond 64 bits": ({"samples": 1 << 63}, r"\$\.samples"),
    "a config with a list": ({"config": {"BLOCK": [1]}}, r"\$\.config\.BLOCK"),
    "an empty config": ({"config": {}}, r"\$\.config"),
    "no day": ({"created_at": "2026-13-45T00:00:00.000000+00:00"}, "month must be in"),
    "a run on no day": ({"run": {**RUN, "started_at": "2026-02-30T00:00:00.000000+00:00"}}, "day is out of range"),
    "an end on no day": ({"run": {**RUN, "finished_at": "2026-02-30T00:00:00.000000+00:00"}}, "day is out of range"),
    "a failure that won a race": ({**FAILED, "winner": None}, "won no race"),
    "a winner without a race": ({"races": []}, "races is empty"),
    "a race below zero": ({"races": [{**RACE, "tuned_ms": -1.0}]}, r"\$\.races\[0\]\.tuned_ms"),
    "a race on no day": ({"races": [{**RACE, "created_at": "2026-02-30T00:00:00.000000+00:00"}]}, "day is out of"),
    "a race that none can follow": (
        {"races": [{**RACE, "created_at": "9999-12-31T23:59:59.999999+00:00"}]},
        "before the year 9999",
    ),
    "a race that knows what no run is": ({"races": [{**RACE, "known": ["here"]}]}, r"\$\.races\[0\]\.known\[0\]"),
    "half a character": ({"reason": "\ud800"}, "surrogates not allowed"),
    "no time of day": ({"created_at": "yesterday"}, r"\$\.created_at"),
    "a text without end": ({"reason": "x" * 9000}, r"\$\.reason"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_record_may_not_hold(record, name):
    change, words = CHANGES[name]
    lines = text([record, record | change])
    with pytest.raises(records.RecordError, match=rf"shared\.jsonl, line 3: .*{words}.*nothing was taken"):
        parsed(lines)


@pytest.mark.parametrize("missing", ["device", "template", "problem", "config", "run", "races", "winner", "protocol"])
def test_what_a_record_must_hold(record, missing):
    with pytest.raises(records.RecordError, match=f"line 2: .*'{missing}' is a required property"):
        parsed(text([{k: v for k, v in record.items() if k != missing}]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"format', "line 2: no JSON: Unterminated string starting at character 2; nothing was taken"),
        ('{"format"', "line 2: no JSON: Expecting ':' delimiter at character 10; nothing was taken"),
        ("", "Expecting|is empty"),
        ("[" * 100_000, "nested too deeply|Expecting"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": -1e400}', "beyond all numbers"),
        ('"' + "x" * records.LONGEST + '"', "is longer than"),
        ("17", "17 is not of type 'object'"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit|integer string"),
    ],
)
def test_lines_that_are_no_records(line, words):
    with pytest.raises(records.RecordError, match=words):
        parsed(json.dumps(records.HEADER) + "\n" + line + "\n")


def test_the_first_line_says_what_the_file_is(record):
    with pytest.raises(records.RecordError, match="line 1: must be the header"):
        parsed(json.dumps(record) + "\n")
    with pytest.raises(records.RecordError, match="version must be 1 or 2, but is 3: upgrade"):
        parsed(json.dumps(records.HEADER | {"version": 3}) + "\n")
    with pytest.raises(records.RecordError, match="is empty"):
        parsed("")
    assert parsed(json.dumps(records.HEADER)) == []


def test_the_schema_is_one_and_covers_the_header():
    from jsonschema import Draft202012Validator

    schema = json.loads(records.SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(records.HEADER)


# --- snapshots


def test_a_snapshot_serves_what_the_database_serves(path, tmp_path):
    found = exported(make(path))
    frozen = tmp_path / "job.db"
    digest = transfer.freeze(path, frozen)
    assert digest == hashlib.sha256(frozen.read_bytes()).hexdigest() and os.stat(frozen).st_mode & 0o777 == 0o444
    assert exported(frozen) == found and execute(frozen, "PRAGMA journal_mode") == [("delete",)]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(("job", ".job"))) == ["job.db"]
    make(path)
    with pytest.raises(ReadOnlyError, match=r"job\.db may only be read"):  # whoever asks
        Store(frozen)
    assert exported(frozen) == found  # stays as it was


def test_a_snapshot_in_a_directory_that_may_not_be_written(path, shared_dir):
    transfer.freeze(make(path), shared_dir / "job.db")
    shared_dir.chmod(0o555)
    loaded = unprivileged(lambda: len(reader.load(shared_dir / "job.db", "cuda", 90).entries))
    assert loaded == 1


def test_a_snapshot_is_never_replaced_and_needs_a_source(path, tmp_path):
    make(path)
    target = tmp_path / "there"
    target.write_text("mine")
    with pytest.raises(SnapshotError, match="exists already"):
        transfer.freeze(path, target)
    assert target.read_text() == "mine"
    with pytest.raises(MissingError):
        transfer.freeze(tmp_path / "none.db", tmp_path / "job.db")
    with pytest.raises(SnapshotError, match="cannot be written"):
        transfer.freeze(path, tmp_path / "no" / "job.db")
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(path.read_bytes()[:100] + b"\xff" * 8000)
    with pytest.raises(CorruptError, match=r"damaged\.db"):
        transfer.freeze(damaged, tmp_path / "job.db")
    assert not (tmp_path / "job.db").exists()


def test_a_snapshot_while_another_process_writes(path, tmp_path):
    make(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO config (key) VALUES ('half done')")
        transfer.freeze(path, tmp_path / "job.db")
        other.execute("ROLLBACK")
    assert execute(tmp_path / "job.db", "SELECT key FROM config") == [(CONFIG.key,)]


def test_ranks_of_a_job_resolve_alike(path, tmp_path):
    """Two ranks under torchrun, no word between them, one snapshot."""
    from sparsek_tune.kernel_templates import TEMPLATES
    from sparsek_tune.problem import Problem, target_device

    problem, device = Problem.of("bf16", 128, 4, "kv", 1024, 0, 16384, 8), replace(target_device("cuda:90"), name="GPU")
    with Store(path) as store:
        for name, warps in (("forward", 8), ("dq", 8)):
            t = TEMPLATES[name]
            config = Config({**t.default(problem, device), "num_warps": warps})
            store.set_winner(store.record(device, t, problem, config, OK, store.start_run("test")), 0.3, 0.2)
    transfer.freeze(path, tmp_path / "job.db")
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from sparsek_tune.dispatch import resolve\n"
        "from sparsek_tune.problem import Problem, target_device\n"
        f"plan = resolve(Problem{tuple(problem)}, replace(target_device('cuda:90'), name='GPU'))\n"
        "found = {n: (r.grade, r.config, r.reason) for n, r in plan.items()}\n"
        "Path(f\"{__file__}.{os.environ['RANK']}\").write_text(json.dumps(found))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "SPARSEK_TUNE_CACHE": str(tmp_path / "job.db")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / f"rank.py.{rank}").read_text() for rank in (0, 1))
    assert one == two
    assert json.loads(one)["forward"][0] == "exact" and json.loads(one)["forward"][1]["num_warps"] == 8


def test_damage_that_copying_meets_is_the_databases_not_the_snapshots(path, tmp_path):
    make(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096] + b"\xff" * 4096)
    with pytest.raises(CorruptError, match="is damaged"):
        transfer.freeze(path, tmp_path / "job.db")
    assert not (tmp_path / "job.db").exists()


@pytest.mark.parametrize(("code", "kind"), [
    (sqlite3.SQLITE_IOERR_READ, DatabaseError), (sqlite3.SQLITE_IOERR_WRITE, SnapshotError),
    (sqlite3.SQLITE_FULL, SnapshotError),
])  # fmt: skip
def test_what_fails_is_said_of_the_file_that_fails(path, tmp_path, code, kind):
    class Broken:
        def execute(self, *_):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = code
            raise error

    with pytest.raises(DatabaseError) as error:
        transfer._copy(Broken(), path, tmp_path / "copy.db", tmp_path / "job.db")
    assert type(error.value) is kind and str(path if kind is DatabaseError else "job.db") in str(error.value)
