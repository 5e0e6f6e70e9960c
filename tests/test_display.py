"""Progress, with a clock that the tests turn: a display on a terminal, lines elsewhere."""

from __future__ import annotations

import re

import pytest

from sparsek_tune.display import progress
from sparsek_tune.presets import Shape
from sparsek_tune.tune import Event, Row

PROBLEM = Shape().problem
ROW = Row(PROBLEM, "dq", 0.4, 0.25, 1.6, 2, 0, 0, 0, None)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def trial(done, rate=2.0, left=24.0, **changes):
    event = Event("trial", "dq", PROBLEM, done, 80, 0.25, "infeasible: [spills]", 0.4, rate, left)
    return event._replace(**{"kernels_done": 3, "kernels": 15, "run_seconds_left": 3723.0, **changes})


START = Event("start", "dq", PROBLEM, 30, 80, None, "30 of 80 configs known", kernels_done=3, kernels=15)
NOTE = Event("note", "dq", PROBLEM, 0, 0, None, "the budget [is] spent")
DONE = Event("done", "dq", PROBLEM, 80, 80, 0.24, "", 0.41, None, 0.0, None, ROW, 4, 15, 60.0)


@pytest.fixture
def terminal(monkeypatch, request):
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, getattr(request, "param", "1"))
    monkeypatch.setenv("TTY_INTERACTIVE", "1")


def last_frame(text):
    """The lines of the display as it was left, without escape sequences."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r", "\n"))
    return [line.strip() for line in plain.split("\n") if line.strip()]


def test_on_a_terminal_a_line_for_every_kernel_and_one_for_all(terminal, capsys):
    clock = Clock()
    with progress(clock=clock) as show:
        show(START)
        clock.now += 10
        show(trial(34))
        clock.now += 4  # time left runs down, whatever comes
    out, err = capsys.readouterr()
    everything, kernel = last_frame(err)[-2:]
    assert out == "" and "\x1b[" in err
    assert re.search(r"^kernels +.* 3/15 +0:14 +1:01:59 left$", everything)
    assert re.search(r"^dq +.* 34/80 +0\.250 ms \(1\.60x\) +2\.0/s +0:14 +0:20 left +dtype=bf16", kernel)


def test_what_is_done_stays_above_the_display(terminal, capsys):
    with progress(clock=Clock()) as show:
        for event in (START, trial(34), NOTE, DONE):
            show(event)
    lines = last_frame(capsys.readouterr().err)
    assert lines[-1].startswith("kernels") and "4/15" in lines[-1] and "1:00 left" in lines[-1]
    assert any("the budget [is] spent" in line for line in lines)
    assert f"done  dq [{PROBLEM}] 80 configs, best 0.250 ms (1.60x) kernels" in " ".join(lines)  # it may be wrapped


def test_stdout_belongs_to_the_program(terminal, capsys):
    with progress() as show:
        show(START)
        print("a line of JSON")
    out, err = capsys.readouterr()
    assert out == "a line of JSON\n" and "a line of JSON" not in err


def test_nothing_moves_where_it_may_not(terminal, capsys):
    with progress(live=False) as show:
        show(START)
    assert capsys.readouterr().err == f"start dq [{PROBLEM}]: 30 of 80 configs known\n"


@pytest.mark.parametrize("terminal", [""], indirect=True)
def test_elsewhere_a_line_for_begin_and_end_and_one_now_and_then(terminal, capsys):
    clock = Clock()
    with progress(clock=clock) as show:
        show(START)
        for second in range(1, 100):
            clock.now = 1000.0 + second
            show(trial(30 + second // 2))
        show(NOTE)
        show(DONE)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and [line.split()[0] for line in lines] == ["start", *["trial"] * 3, "note", "done"]
    status = "45 of 80 configs, best 0.250 ms (1.60x), 2.0/s, 0:24 left; 3 of 15 kernels, 1:02:03 left"
    assert lines[1] == f"trial dq [{PROBLEM}] {status}"
    assert lines[-2] == f"note  dq [{PROBLEM}]: the budget [is] spent"
    assert lines[-1] == f"done  dq [{PROBLEM}] 80 configs, best 0.250 ms (1.60x)"


@pytest.mark.parametrize("terminal", [""], indirect=True)
def test_what_is_not_known_is_left_out(terminal, capsys):
    clock = Clock()
    with progress(clock=clock) as show:
        clock.now += 31
        show(trial(3, rate=None, left=None, best_ms=None, default_ms=None, run_seconds_left=None))
        clock.now += 31
        show(trial(4, rate=0.053, left=59.6, default_ms=None))
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("] 3 of 80 configs; 3 of 15 kernels")
    assert "4 of 80 configs, best 0.250 ms, 0.05/s, 1:00 left;" in second


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_narrow_terminal(terminal, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with progress(clock=Clock()) as show:
        show(START)
        show(trial(34))
    lines = last_frame(capsys.readouterr().err)
    assert lines[-2].startswith("kern") and all(len(line) <= int(columns) for line in lines)
    if columns == "80":
        assert "34/80" in lines[-1] and "0:24 left" in lines[-1] and "(1.60x)" in lines[-1]
