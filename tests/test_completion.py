"""Completion, in the shells themselves: what a line becomes when the tab key is pressed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from sparsek_tune import cli
from sparsek_tune.options import FIELDS
from sparsek_tune.presets import MODELS
from sparsek_tune.problem import TARGETS
from sparsek_tune.tune import EFFORTS

BREAKS = " \t\n\"'@><=;|&(:"  # bash's own COMP_WORDBREAKS


def candidates(line):
    """What bash is offered for ``line``, the cursor at its end."""
    env = {"_SPARSEK_TUNE_COMPLETE": "bash_complete", "COMP_WORDS": f"sparsek-tune {line}", "COMP_WORDBREAKS": BREAKS}
    result = CliRunner().invoke(cli.main, prog_name="sparsek-tune", env=env)
    assert result.exit_code == 0, result.output
    return [tuple(found.split(",", 1)) for found in result.output.splitlines() if found]


def plain(values):
    return [("plain", value) for value in values]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("run --model ", plain(MODELS)),
        ("run --model q", plain(m for m in MODELS if m.startswith("q"))),
        ("resolve --shape ", plain(f"{f}=" for f in FIELDS)),
        ("bench --shape h", plain(("hq=", "hkv="))),
        ("run --shape n=4096,h", plain(("4096,hq=", "4096,hkv="))),  # bash replaces what follows the last "="
        ("run --shape n=4096,hq=8,h", plain(("8,hkv=",))),
        ("run --shape n=", []),
        ("run --shape gate=", plain(("kv", "v", "none"))),
        ("run --shape=dtype=f", plain(("fp16", "fp32"))),
        ("run --shape n=4096 ", []),
        ("run --effort ", plain(EFFORTS)),
        ("run --effort=", plain(EFFORTS)),
        ("run --target ", plain(TARGETS)),
        ("run --target cuda:8", plain(t.removeprefix("cuda:") for t in TARGETS if t.startswith("cuda:8"))),
        ("run --captured seen", [("file", "seen")]),
        ("run --captured=see", [("file", "see")]),
        ("import ", [("file", "")]),
        ("bench --json ", [("file", "")]),
        ("completion ", plain(("bash", "zsh", "fish"))),
        ("run --model gpt2-small --eff", plain(("--effort",))),
    ],
)
def test_candidates(line, found):
    assert candidates(line) == found


def test_a_word_is_whole_where_bash_is_told_so(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BREAKS", " \t\n")
    assert candidates("run --target cuda:9") == plain(("cuda:90",))
    assert candidates("run --effort=q") == plain(("--effort=quick",))


@pytest.fixture
def folder(tmp_path):
    """Where the shell runs: the program, and a file with a blank in its name."""
    program = tmp_path / "bin" / "sparsek-tune"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom sparsek_tune.cli import main\nmain(prog_name='sparsek-tune')\n")
    program.chmod(0o755)
    (tmp_path / "seen one.json").touch()
    return tmp_path


def environment(folder):
    names = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "TERM": "dumb", "PS1": "$ "}
    return {**os.environ, **names, "XDG_CONFIG_HOME": str(folder), "XDG_DATA_HOME": str(folder)}


class Shell:
    """An interactive shell on a terminal of its own."""

    def __init__(self, folder, *command):
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, environment(folder))

    def words(self, keys):
        """The words of the command line after ``keys`` and an X."""
        # Home, a command that prints all that follows, end, return.
        self._send(f"{keys}X\x01printf '<%s>' \x05; echo '<'end'>'\r")
        shown = self._until("<end>")
        return re.findall(r"<([^<>]*)>", shown[shown.rindex("<sparsek-tune>") :])[1:-1]

    def run(self, command):
        self._send(f"{command}; echo '<'end'>'\r")
        self._until("<end>")

    def close(self):
        os.close(self._terminal)
        os.waitpid(self._pid, 0)

    def _send(self, keys):
        os.write(self._terminal, keys.encode())

    def _until(self, mark):
        shown, end = "", time.monotonic() + 30
        while mark not in shown:
            assert select.select([self._terminal], [], [], end - time.monotonic())[0], shown
            shown += os.read(self._terminal, 65536).decode(errors="replace")
        return shown


LINES = {
    "sparsek-tune ru\t": ["run", "X"],
    "sparsek-tune run --model pythia-1.\t": ["run", "--model", "pythia-1.4b", "X"],
    "sparsek-tune run --shape n=4096,ga\t": ["run", "--shape", "n=4096,gate=X"],
    "sparsek-tune run --shape n=4096,ga\tno\t": ["run", "--shape", "n=4096,gate=none", "X"],
    "sparsek-tune run --shape=k=512,dt\tb\t": ["run", "--shape=k=512,dtype=bf16", "X"],
    "sparsek-tune run --effort=q\t": ["run", "--effort=quick", "X"],
    "sparsek-tune run --target \t9\t": ["run", "--target", "cuda:90", "X"],
    "sparsek-tune run --target=cuda:9\t": ["run", "--target=cuda:90", "X"],
    "sparsek-tune run --captured se\t": ["run", "--captured", "seen one.json", "X"],
    "sparsek-tune run --captured=se\t": ["run", "--captured=seen one.json", "X"],
}


@pytest.mark.parametrize(
    ("command", "setup"),
    [
        (("bash", "--norc", "--noprofile", "-i"), 'eval "$(sparsek-tune completion bash)"'),
        (("zsh", "-f", "-i"), 'autoload -U compinit; compinit -u -D; eval "$(sparsek-tune completion zsh)"'),
    ],
    ids=["bash", "zsh"],
)
def test_the_tab_key(folder, command, setup):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    shell = Shell(folder, *command)
    try:
        shell.run(setup)
        assert {keys: shell.words(keys) for keys in LINES} == LINES
    finally:
        shell.close()


def test_fish(folder):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    lines = {
        "ru": ["run"],
        "run --shape n=4096,ga": ["n=4096,gate="],
        "run --shape n=4096,gate=": ["n=4096,gate=kv", "n=4096,gate=none", "n=4096,gate=v"],
        "run --effort=q": ["--effort=quick"],
        "run --target cuda:9": ["cuda:90"],
        "run --captured se": ["seen one.json"],
        "run --captured=se": ["--captured=seen one.json"],
    }
    ask = "sparsek-tune completion fish | source; for line in $argv; complete -C $line; echo end; end"
    command = ["fish", "--no-config", "-c", ask, *(f"sparsek-tune {line}" for line in lines)]
    done = subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True, check=True)
    answers = [answer.splitlines() for answer in done.stdout.split("end\n")[:-1]]
    assert [sorted(line.split("\t")[0] for line in answer) for answer in answers] == list(lines.values()), done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_both_ways_to_the_script_give_one(folder, shell):
    env = {**environment(folder), "_SPARSEK_TUNE_COMPLETE": f"{shell}_source"}
    by_variable = subprocess.run(["sparsek-tune"], env=env, capture_output=True, text=True, check=True).stdout
    result = CliRunner().invoke(cli.main, ["completion", shell])
    assert result.exit_code == 0 and result.stdout.strip() == by_variable.strip() != ""


def test_an_unknown_shell():
    result = CliRunner().invoke(cli.main, ["completion", "tcsh"])
    assert result.exit_code == 2 and "bash" in result.stderr


def test_it_loads_nothing_heavy(folder):
    env = {
        **environment(folder), "_SPARSEK_TUNE_COMPLETE": "bash_complete", "COMP_WORDS": "sparsek-tune run --target ",
        "COMP_WORDBREAKS": BREAKS, "PYTHONPROFILEIMPORTTIME": "1",
    }  # fmt: skip
    done = subprocess.run(["sparsek-tune"], env=env, capture_output=True, text=True, check=True)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "cuda:" not in done.stderr and "plain,cuda:90" in done.stdout and "sparsek_tune" in loaded
    assert not loaded & {"torch", "triton", "numpy", "optuna", "sqlalchemy", "rich", "jsonschema"}
