"""Problems that a program has are counted, kept whatever happens, and tuned in the order of their time."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from click.testing import CliRunner

import sparsek_tune
from sparsek_tune import captured, cli
from sparsek_tune.ops import sparsek_attention, sparsek_select
from sparsek_tune.problem import Problem
from sparsek_tune.tune.static import busiest_first

SMALL = Problem.of("fp32", 16, 2, "kv", 4, 2, 24, 2)
BIG = Problem.of("bf16", 128, 4, "kv", 1024, 0, 65536, 8)


def attend(n=24, b=1, backward=True, dtype=torch.float32):
    q, k, v = (torch.randn(b, h, n, 16, dtype=dtype, requires_grad=backward) for h in (4, 2, 2))
    out = sparsek_attention(q, k, v, torch.randn(b, 2, n), 4, window=2)
    if backward:
        out.sum().backward()


def test_calls_and_backward_passes_are_counted_by_problem():
    with sparsek_tune.capture() as seen:
        attend()
        attend(backward=False)
        attend(n=30)  # the same power of two
        attend(b=3)
        sparsek_select(torch.randn(1, 2, 24), 4)
    attend()
    four = SMALL._replace(rows=8)
    assert seen.counts == {SMALL: {"forward": 3, "backward": 2}, four: {"forward": 1, "backward": 1}}
    assert not captured.active


def test_a_compiled_model_is_counted():
    run = torch.compile(attend, backend="aot_eager", fullgraph=False)
    with sparsek_tune.capture() as seen:
        run()
        run()
    assert seen.counts == {SMALL: {"forward": 2, "backward": 2}}


def test_a_call_that_fails_and_one_that_cannot_be_tuned_are_not():
    with sparsek_tune.capture() as seen:
        with pytest.raises(ValueError):
            sparsek_attention(*(torch.randn(1, 2, 8, 16) for _ in range(3)), torch.randn(1, 2, 8), 0)
        x = torch.randn(1, 2, 8, 16, dtype=torch.float64)
        sparsek_attention(x, x, x, torch.randn(1, 2, 8), 4)
    assert seen.counts == {}


def test_blocks_nest_and_threads_count(tmp_path):
    with sparsek_tune.capture(tmp_path / "a.json"), sparsek_tune.capture() as inner:
        threads = [
            threading.Thread(target=lambda: [captured.note(SMALL, "forward") for _ in range(500)]) for _ in "abcd"
        ]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert inner.counts == captured.read(tmp_path / "a.json") == {SMALL: {"forward": 2000, "backward": 0}}


def test_a_file_is_added_to(tmp_path):
    path = tmp_path / "a.json"
    for _ in range(2):
        with sparsek_tune.capture(path):
            captured.note(SMALL, "forward")
            captured.note(BIG, "backward")
    assert captured.read(path) == {BIG: {"forward": 0, "backward": 2}, SMALL: {"forward": 2, "backward": 0}}
    with pytest.raises(ZeroDivisionError), sparsek_tune.capture(path):
        captured.note(BIG, "backward")
        raise ZeroDivisionError
    assert captured.read(path)[BIG]["backward"] == 3


PROGRAM = """
import os, signal, sys
import sparsek_tune.ops
from sparsek_tune import captured
from sparsek_tune.problem import Problem
small = Problem.of("fp32", 16, 2, "kv", 4, 2, 24, 2)
for _ in range(int(sys.argv[1])):
    captured.note(small, "forward")
if sys.argv[2] == "killed":
    captured.note(small._replace(k=8), "forward")
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "forks" and os.fork() == 0:
    sys.exit()
"""


def program(path, count, how="ends"):
    env = {**os.environ, "SPARSEK_TUNE_CAPTURE": str(path)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(count), how], env=env, stderr=subprocess.PIPE, text=True
    )


def test_the_environment_captures_in_several_processes_at_once(tmp_path):
    path = tmp_path / "a.json"
    running = [program(path, count, how) for count, how in ((10, "ends"), (20, "forks"), (30, "ends"))]
    assert [p.wait(120) for p in running] == [0, 0, 0]
    assert captured.read(path) == {SMALL: {"forward": 60, "backward": 0}}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_process_leaves_the_problems(tmp_path):
    process = program(tmp_path / "a.json", 10, "killed")
    assert process.wait(120) == -signal.SIGKILL
    assert set(captured.read(tmp_path / "a.json")) == {SMALL, SMALL._replace(k=8)}


def test_a_file_that_cannot_be_written_does_not_stop_the_program(tmp_path):
    process = program(tmp_path / "no" / "a.json", 3)
    assert process.wait(120) == 0
    assert "problems are not captured in" in process.stderr.read()


GOOD = {
    "format": "sparsek-tune-captured",
    "version": 1,
    "problems": [{"problem": SMALL._asdict(), "forward": 1, "backward": 0}],
}


def changed(**fields):
    return {**GOOD, "problems": [{**GOOD["problems"][0], **fields}]}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "Expecting"),
        ("[]", "it holds no object"),
        ({}, "'format' is missing"),
        ({**GOOD, "version": 2}, "format must be"),
        (changed(forward=-1), "counts must be whole"),
        (changed(forward=1.5), "counts must be whole"),
        (changed(problem={**SMALL._asdict(), "n": 24}), "powers of two"),
        (changed(problem={**SMALL._asdict(), "k": 0}), "above 0"),
        (changed(problem={**SMALL._asdict(), "k": True}), "must be whole"),
        (changed(problem={**SMALL._asdict(), "dtype": "int8"}), "no problem of dtype 'int8'"),
        (changed(problem={**SMALL._asdict(), "d": 512}), "d must be at most 256, but is 512"),
        (changed(problem={**SMALL._asdict(), "g": 65}), "g must be at most 64, but is 65"),
        (changed(problem={**SMALL._asdict(), "rows": 1 << 17}), "rows must be at most 65536"),
        (changed(problem={**SMALL._asdict(), "n": 1 << 30}), "n must be at most 536870912"),
        (changed(problem={"d": 1}), "missing 7 required"),
    ],
)
def test_files_that_are_no_captures(tmp_path, document, words):
    path = tmp_path / "a.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=rf"a\.json is no file of captured problems: .*{words}"):
        captured.read(path)
    before = path.read_text()
    with pytest.raises(ValueError), sparsek_tune.capture(path):
        pass
    result = CliRunner().invoke(cli.main, ["run", "--target", "cuda:90", "--captured", str(path)])
    assert result.exit_code == 2 and "--captured" in result.stderr and path.read_text() == before


def test_where_nothing_can_be_captured_is_said_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", ValueError), (tmp_path / "no" / "a", OSError), (tmp_path, ValueError)):
        with pytest.raises(kind), sparsek_tune.capture(path):
            pytest.fail("the block ran")
        monkeypatch.setenv("SPARSEK_TUNE_CAPTURE", str(path))
        with pytest.warns(UserWarning, match="will not be captured"):
            captured.start()
        mine = captured.active.pop()
        atexit.unregister(mine.save)
        with pytest.warns(UserWarning, match="are not captured"):  # and the program goes on
            mine.note(SMALL, "forward")


def test_the_most_time_goes_first():
    longer = BIG._replace(n=1 << 20)
    counts = {
        SMALL: {"forward": 100, "backward": 100},
        BIG: {"forward": 100, "backward": 0},
        BIG._replace(gate="v"): {"forward": 100, "backward": 100},
        longer: {"forward": 1, "backward": 0},
    }
    assert busiest_first(counts) == [BIG._replace(gate="v"), BIG, longer, SMALL]


def test_run_tunes_what_was_captured(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEK_TUNE_CACHE", str(tmp_path / "cache.db"))
    for name, problem in (("a", SMALL), ("b", BIG), ("c", SMALL)):
        with sparsek_tune.capture(tmp_path / name):
            captured.note(problem, "forward")
    seen = []
    monkeypatch.setattr("sparsek_tune.tune.tune", lambda problems, *a, **k: seen.append(list(problems)) or [])
    files = [x for name in "abc" for x in ("--captured", str(tmp_path / name))]
    CliRunner().invoke(cli.main, ["run", "--target", "cuda:90", *files])
    CliRunner().invoke(cli.main, ["run", "--target", "cuda:90", *files[:2], "--model", "gpt2-small"])
    assert seen[0] == [BIG, SMALL] and seen[1][0] == SMALL and len(seen[1]) == 2
    (tmp_path / "empty").write_text(json.dumps({**GOOD, "problems": []}))
    result = CliRunner().invoke(cli.main, ["run", "--target", "cuda:90", "--captured", str(tmp_path / "empty")])
    assert result.exit_code == 2 and "nothing was captured" in result.stderr
