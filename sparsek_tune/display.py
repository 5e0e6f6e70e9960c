"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from sparsek_tune.tune import Event


@contextlib.contextmanager
def progress(live: bool = True, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[Event], None]]:
    """Yields what to call with every event: a display that moves on a terminal, if it may be ``live``, or lines."""
    console = Console(stderr=True)
    if not (live and console.is_terminal):
        yield _Lines(clock).show
        return
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # a narrow terminal cuts this one
    # stdout is left alone: events as JSON lines may go there.
    with Progress(
        TextColumn("{task.description:9}"), BarColumn(10), MofNCompleteColumn(), TextColumn("{task.fields[best]:>17}"),
        TextColumn("{task.fields[rate]:>7}"), _Elapsed(), _Left(clock),
        TextColumn("{task.fields[problem]}", "dim", table_column=rest),
        console=console, expand=True, redirect_stdout=False, get_time=clock,
    ) as bars:  # fmt: skip
        yield _Bars(bars, clock).show


class _Bars:
    """A line for the whole run and one for every kernel under way; above them what is done, and notes."""

    def __init__(self, bars: Progress, clock: Callable[[], float]) -> None:
        self._bars, self._clock = bars, clock
        self._all = self._add("kernels", "")
        self._tasks: dict[tuple[str, Any], TaskID] = {}

    def show(self, event: Event) -> None:
        key = (event.template, event.problem)
        if event.kind in ("start", "trial", "race"):
            if key not in self._tasks:
                self._tasks[key] = self._add(event.template, str(event.problem))
            self._update(self._tasks[key], event.done, event.total, event.seconds_left)
            self._bars.update(self._tasks[key], best=_best(event), rate=_rate(event))
        else:
            self._bars.console.print(_words(event), highlight=False, markup=False)
        if event.kind == "done" and key in self._tasks:
            self._bars.remove_task(self._tasks.pop(key))
        self._update(self._all, event.kernels_done, event.kernels, event.run_seconds_left)

    def _add(self, name: str, problem: str) -> TaskID:
        return self._bars.add_task(name, total=None, best="", rate="", problem=problem, ends=None)

    def _update(self, task: TaskID, done: int, total: int, left: float | None) -> None:
        ends = None if left is None else self._clock() + left
        self._bars.update(task, completed=done, total=total or None, ends=ends)


class _Elapsed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{_duration(task.elapsed or 0.0):>7}")


class _Left(ProgressColumn):
    """Runs down between the events."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        return Text("" if ends is None else f"{_duration(ends - self._clock()):>7} left")


class _Lines:
    """A line when a kernel begins and ends; where nothing was said for long, one that says how far it is."""

    EVERY = 30.0  # seconds

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said = clock()

    def show(self, event: Event) -> None:
        if event.kind not in ("start", "done", "note") and self._clock() - self._said < self.EVERY:
            return
        self._said = self._clock()
        with contextlib.suppress(OSError):  # nobody listens any more: no reason to stop
            click.echo(_words(event), err=True)


def _words(event: Event) -> str:
    about = f" [{event.problem}]" if any(event.problem) else ""  # some notes are about no kernel
    head, best = f"{event.kind:5} {event.template}{about}", _best(event)
    best = best and f"best {best}"
    if event.kind in ("trial", "race"):
        kernel = (f"{event.done} of {event.total} configs", best, _rate(event), _left(event.seconds_left))
        run = (f"{event.kernels_done} of {event.kernels} kernels", _left(event.run_seconds_left))
        return f"{head} {_list(kernel)}; {_list(run)}"
    count = f" {_list((f'{event.done} configs', best))}" if event.kind == "done" else ""
    return head + count + (f": {event.message}" if event.message else "")


def _list(words: Iterable[str]) -> str:
    return ", ".join(filter(None, words))


def _best(event: Event) -> str:
    """The best time so far, of what is done the winner's, and how many times longer the default takes."""
    best, default = event.best_ms, event.default_ms
    if event.row is not None:
        best, default = event.row.tuned_ms, event.row.default_ms
    if best is None:
        return ""
    return f"{best:.3f} ms" + (f" ({default / best:.2f}x)" if default is not None else "")


def _rate(event: Event) -> str:
    return "" if event.rate is None else f"{event.rate:.1f}/s" if event.rate >= 1 else f"{event.rate:.2f}/s"


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{_duration(seconds)} left"


def _duration(seconds: float) -> str:
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


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
