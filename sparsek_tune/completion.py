"""Completion in the shell, by click's machinery: what it leaves open of words that hold ``=`` or ``:``.

bash takes such a word apart, and replaces its last part alone; in ``--option=value`` click completes the value, where
zsh and fish take the whole word. A field of a shape ("n=") gets no space behind it.
"""

from __future__ import annotations

import os

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

PROGRAM = "sparsek-tune"
VARIABLE = "_SPARSEK_TUNE_COMPLETE"


@add_completion_class
class Bash(BashComplete):
    """Gets the line up to the cursor as COMP_WORDS, and what separates words."""

    source_template = r"""%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                COMPREPLY+=("$value")
                [[ $value == *= ]] && compopt -o nospace
                ;;
        esac
    done < <(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \
        %(complete_var)s=bash_complete "$1")
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        # With a character more the last word is the one under the cursor, even where it is empty.
        *words, word = split_arg_string(os.environ["COMP_WORDS"] + "_")
        word = word[:-1]
        option, value = _option_and_value(word)
        self._before = option  # what the shell's word holds before click's
        # What stays: all up to the last separator.
        self._kept = 1 + max(word.rfind(c) for c in os.environ["COMP_WORDBREAKS"])
        return [*words[1:], *([option[:-1]] if option else [])], value

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{(self._before + item.value)[self._kept :]}"


@add_completion_class
class Fish(FishComplete):
    # Values may hold commas; files are completed by fish itself, in the word as it was typed.
    source_template = FishComplete.source_template.replace(
        'string split "," $completion', 'string split --max 1 "," $completion'
    ).replace("__fish_complete_path $metadata[2]", "complete --do-complete \"'' \"(commandline -ct)")

    def get_completion_args(self) -> tuple[list[str], str]:
        args, word = super().get_completion_args()
        self._before, _ = _option_and_value(word)
        return args, word

    def format_completion(self, item: CompletionItem) -> str:
        return super().format_completion(CompletionItem(self._before + item.value, item.type, item.help))


@add_completion_class
class Zsh(ZshComplete):
    source_template = ZshComplete.source_template.replace(
        "    for type key",
        "    [[ $PREFIX == --* ]] && compset -P 1 '*='\n    for type key",
    ).replace(
        "compadd -U -V unsorted -a completions",
        "compadd -U -i \"$IPREFIX\" -V unsorted -S '' -- ${(M)completions:#*=}\n"
        '        compadd -U -i "$IPREFIX" -V unsorted -- ${completions:#*=}',
    )


def _option_and_value(word: str) -> tuple[str, str]:
    """ "--option=" and what follows, "" and the word where it is no such word."""
    option, sign, value = word.partition("=")
    return (option + sign, value) if sign and option.startswith("--") else ("", word)


@click.command("completion")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and their values in SHELL.

    \b
    bash, in ~/.bashrc:                 eval "$(sparsek-tune completion bash)"
    zsh, in ~/.zshrc, after compinit:   eval "$(sparsek-tune completion zsh)"
    fish:  sparsek-tune completion fish > ~/.config/fish/completions/sparsek-tune.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, PROGRAM, VARIABLE).source())


COMMANDS = (completion_command,)
