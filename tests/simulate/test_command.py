"""The command simulate: tables, a document, a plot, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from sparsek_tune import cli, simulation
from sparsek_tune.simulate import run, strategies
from sparsek_tune.tune import samplers

FEW = ("--kernel", "schedule", "--seeds", "2", "--trials", "10")


def invoke(*args):
    return CliRunner().invoke(cli.main, ["simulate", *map(str, args)])


def test_a_table_of_what_each_strategy_finds(file):
    result = invoke(file, *FEW, "--strategy", "random", "--strategy", "static")
    assert result.exit_code == 0, result.output
    assert "Over kernels and problems" in result.stdout and "Pruning" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("schedule")]
    assert len(rows) == 4 + 2  # two strategies at two problems; pruning at two
    assert "4 of 4" in result.stderr and "left out" not in result.stderr


def test_a_document_holds_enough_for_the_table_and_the_plot(file, tmp_path):
    first = invoke(file, *FEW, "--strategy", "random", "--jobs", "2", "--json")
    document = json.loads(first.stdout)
    assert [(r["strategy"], r["seeds"], r["measured"]) for r in document["results"]] == [("random", 2, 10)] * 2
    assert len(document["landscapes"]) == 2 and document["landscapes"][0]["dropped"] == 10
    assert document["versions"]["optuna"] and document["summary"]["random"]["landscapes"] == 2
    earlier, drawn = tmp_path / "a.json", tmp_path / "a.png"
    earlier.write_text(first.stdout)
    both = invoke(file, *FEW, "--strategy", "coordinate", "--from", earlier, "--plot", drawn, "--json")
    assert both.exit_code == 0 and drawn.read_bytes().startswith(b"\x89PNG")
    document = json.loads(both.stdout)
    assert [r["strategy"] for r in document["results"]] == ["random"] * 2 + ["coordinate"] * 2
    assert len(document["landscapes"]) == 2
    alone = invoke("--from", earlier)
    assert alone.exit_code == 0 and "random" in alone.stdout


def test_a_plot_that_cannot_be_written_is_found_before_anything_is_replayed(file, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsek_tune.simulate.run.replays", lambda *_: pytest.fail("replayed"))
    result = invoke(file, *FEW, "--plot", tmp_path / "no" / "a.png")
    assert result.exit_code == 1 and "a.png cannot be written: No such file or directory" in result.stderr


def test_a_plot_that_fails_costs_no_result(file, tmp_path, monkeypatch):
    def draw(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsek_tune.simulate.plot.draw", draw)
    result = invoke(file, *FEW, "--strategy", "static", "--json", "--plot", tmp_path / "a.png")
    document = json.loads(result.stdout)
    assert result.exit_code == 1 and "No space left" in document["error"] and len(document["results"]) == 2


def test_equal_arguments_give_equal_results_whatever_the_processes(file):
    def results(*options):
        found = json.loads(invoke(file, *FEW, "--strategy", "tpe", "--json", *options).stdout)["results"]
        return [{k: v for k, v in entry.items() if "seconds" not in k} for entry in found]

    assert results("--jobs", 1) == results("--jobs", 2)
    assert results("--jobs", 1) != results("--jobs", 1, "--ahead", 1)


def test_parts_of_spaces_only_where_wanted(file):
    result = invoke(file, "--kernel", "forward", "--strategy", "static")
    assert result.exit_code == 5 and "no complete sweep" in result.stderr
    assert "forward" in result.stderr and "20 of 474 configs" in result.stderr
    assert invoke(file, "--kernel", "forward", "--strategy", "static", "--partial").exit_code == 0


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda text: text[:-40], 4, "nothing was taken from the file"),
        (lambda text: text.replace('"ok"', '"fine"', 1), 4, "line"),
        (lambda text: "", 4, "is empty"),
        (lambda text: text.splitlines()[0] + "\n", 5, "no complete sweep"),
        (lambda text: text.replace('"cc": 90', '"cc": "90"'), 4, "line"),
    ],
)
def test_a_damaged_file_is_named(file, damage, code, words):
    file.write_text(damage(file.read_text()))
    result = invoke(file)
    assert result.exit_code == code and words in result.stderr and file.name in result.stderr


def test_what_is_refused(file, tmp_path, monkeypatch):
    assert "name a file of records" in invoke().stderr
    assert "must end in .png" in invoke(file, "--plot", tmp_path / "a.txt").stderr
    broken = tmp_path / "b.json"
    for text in ("[", "[]", '{"results": []}'):
        broken.write_text(text)
        assert "must be what simulate --json printed" in invoke("--from", broken).stderr
    assert invoke(file, *FEW, "--strategy", "static", "--plot", tmp_path / "no" / "a.png").exit_code == 1
    monkeypatch.setitem(samplers._NEEDS, "random", ("nowhere_to_be_found",))
    assert "pip install nowhere_to_be_found" in invoke(file, "--strategy", "random").stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "sparsek-tune[simulate]" in invoke(file, "--plot", tmp_path / "a.png").stderr


def test_names_that_the_command_spells_out():
    assert simulation.STRATEGIES == strategies.STRATEGIES
    options = {option.name: option for option in simulation.simulate_command.params}
    assert tuple(options["start"].type.choices) == run.STARTS  # type: ignore[attr-defined]
    assert options["trials"].default == run.TRIALS and options["seeds"].default == run.Settings.seeds
    assert options["ahead"].default == run.AHEAD
