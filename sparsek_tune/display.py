"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from sparsek_tune.tune import Event


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Event], None]]:
    """Yields what to call with every event: a live display on a terminal, one line per kernel otherwise."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda event: _line(console, event)
        return
    columns = (TextColumn("{task.description:9}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # a narrow terminal cuts this one
    texts = (TextColumn("{task.fields[best]:>13}"), TextColumn("{task.fields[problem]}", "dim", table_column=rest))
    with Progress(*columns, *texts, console=console, expand=True) as bars:
        tasks: dict[tuple[str, Any], Any] = {}

        def show(event: Event) -> None:
            if event.kind == "note":
                bars.console.print(_words(event), highlight=False)
                return
            key = (event.template, event.problem)
            if key not in tasks:
                tasks[key] = bars.add_task(event.template, total=None, best="", problem=event.problem)
            best = "" if event.best_ms is None else f"{event.best_ms:.3f} ms"
            bars.update(tasks[key], completed=event.done, total=event.total or None, best=best)
            if event.kind == "done":
                bars.update(tasks[key], total=max(event.done, 1), completed=max(event.done, 1))

        yield show


def _line(console: Console, event: Event) -> None:
    if event.kind in ("start", "done", "note"):
        console.print(_words(event), highlight=False, soft_wrap=True)


def _words(event: Event) -> str:
    best = "" if event.best_ms is None else f", best {event.best_ms:.3f} ms"
    count = f" {event.done} configs{best}" if event.kind == "done" else ""
    message = f": {event.message}" if event.message else ""
    return f"{event.kind:5} {event.template} [{event.problem}]{count}{message}".replace("[", r"\[")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table to stdout; numbers to the right, None as a dash. Never cut off where stdout is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)
    out = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(header):
        number = any(isinstance(r[i], int | float) for r in rows)
        out.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        out.add_row(*(_cell(x) for x in row))
    console.print(out)


def _cell(x: Any) -> str:
    if x is None:
        return "-"
    return f"{x:.3f}" if isinstance(x, float) else str(x).replace("[", r"\[")
