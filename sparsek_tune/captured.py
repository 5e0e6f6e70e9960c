"""Which problems a program really has, counted while it runs, so that these are tuned, and most time goes first.

    with sparsek_tune.capture("captured.json"):
        train()

or ``SPARSEK_TUNE_CAPTURE=captured.json python train.py``, then ``sparsek-tune run --captured captured.json``.
Standard library only: the operators look at :data:`active` on every call.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsek_tune.files import check_writable, replacing
from sparsek_tune.kernel_templates.base import next_pow2
from sparsek_tune.limits import HEAD_MAX, LENGTH_MAX, ROWS_MAX, group_max
from sparsek_tune.problem import DTYPES, GATES, Problem

FORMAT, VERSION = "sparsek-tune-captured", 1
VARIABLE = "SPARSEK_TUNE_CAPTURE"
PASSES = ("forward", "backward")

Counts = Mapping[Problem, Mapping[str, int]]

active: list[Captured] = []  # all of them count


class Captured:
    """Calls counted so far. path: the file that they are added to, None for none."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()  # backward passes run on threads of PyTorch's own
        self._counts: Counter[tuple[Problem, str]] = Counter()
        self._saved: Counter[tuple[Problem, str]] = Counter()
        self._pid = os.getpid()

    @property
    def counts(self) -> dict[Problem, dict[str, int]]:
        """Calls by problem and pass ("forward", "backward")."""
        with self._lock:
            return _by_problem(self._counts)

    def note(self, problem: Problem, kind: str) -> None:
        """One call. What is seen for the first time is saved at once, so that a killed process loses counts alone."""
        with self._lock:
            self._counts[problem, kind] += 1
            new = self._counts[problem, kind] == 1
        if new and self.path is not None:
            self.save()

    def save(self) -> None:
        """Add what was counted since the last time to the file; with others that do so at the same time nothing is
        lost. Warns where that fails: the program goes on."""
        if self.path is None or os.getpid() != self._pid:  # a fork's counts are its parent's too
            return
        with self._lock:
            more = self._counts - self._saved
            try:
                if more:
                    _add(self.path, more)
                    self._saved += more
            except (OSError, ValueError) as error:
                warnings.warn(f"sparsek_tune: problems are not captured in {self.path}: {error}", stacklevel=2)


@contextlib.contextmanager
def capture(path: str | os.PathLike[str] | None = None) -> Iterator[Captured]:
    """Within the block, count every call of ``sparsek_attention`` and its backward pass, on all threads, by problem.

    path: a JSON file that the counts are added to; made where it is missing. Yields what was counted (``.counts``). A
    CUDA graph counts when it is captured, not when it is replayed. Blocks nest. Raises ValueError or OSError where
    ``path`` is another kind of file, or cannot be read or written.
    """
    captured = Captured(None if path is None else Path(path))
    if captured.path is not None:
        _check(captured.path)
    active.append(captured)
    try:
        yield captured
    finally:
        active.remove(captured)
        captured.save()


def start() -> None:
    """Count until the process ends, where the environment says so. Called when the operators are imported."""
    if path := os.environ.get(VARIABLE):
        captured = Captured(Path(path))
        try:
            _check(Path(path))
        except (OSError, ValueError) as error:
            warnings.warn(f"sparsek_tune: problems will not be captured in {path}: {error}", stacklevel=2)
        active.append(captured)
        atexit.register(captured.save)


def note(problem: Problem, kind: str) -> None:
    """One call of a kernel pass, for all that count. Problems that cannot be tuned, in float64, are left out."""
    if problem.dtype in DTYPES:
        for captured in list(active):
            captured.note(problem, kind)


def read(path: Path) -> dict[Problem, dict[str, int]]:
    """What was counted into a file. Raises ValueError, saying what is wrong, and OSError."""
    if path.exists() and not path.is_file():  # a pipe or a device might never end
        raise ValueError(f"{path} is no file of captured problems")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("it holds no object")
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"format must be {FORMAT} {VERSION}, but is {document['format']} {document['version']}")
        return {_problem(entry["problem"]): _passes(entry) for entry in document["problems"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        words = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no file of captured problems: {words}") from error


def merged(several: Iterable[Counts]) -> dict[Problem, dict[str, int]]:
    """The sum of what was counted in several places."""
    total: Counter[tuple[Problem, str]] = Counter()
    for counts in several:
        for problem, passes in counts.items():
            for kind, count in passes.items():
                total[problem, kind] += count
    return _by_problem(total)


def _problem(fields: Any) -> Problem:
    problem = Problem(**fields)
    numbers = problem.d, problem.g, problem.k, problem.w, problem.n, problem.rows
    whole = all(type(x) is int and 0 <= x < 2**31 for x in numbers)
    if not whole or 0 in (problem.d, problem.g, problem.k, problem.n, problem.rows):
        raise ValueError(f"numbers must be whole and, but for w, above 0, but are {numbers}")
    if problem.dtype not in DTYPES or problem.gate not in GATES:
        raise ValueError(f"there is no problem of dtype {problem.dtype!r} and gate {problem.gate!r}")
    most = {"d": HEAD_MAX, "g": group_max(problem.d, problem.dtype), "n": LENGTH_MAX, "rows": next_pow2(ROWS_MAX)}
    for name, limit in most.items():
        if getattr(problem, name) > limit:
            raise ValueError(f"{name} must be at most {limit}, but is {getattr(problem, name)}")
    rounded = Problem.of(*problem)
    if rounded != problem:
        raise ValueError(f"n and rows must be powers of two, but are {problem.n} and {problem.rows}")
    return problem


def _passes(entry: Any) -> dict[str, int]:
    counts = {kind: entry[kind] for kind in PASSES}
    if not all(type(x) is int and 0 <= x < 2**63 for x in counts.values()):
        raise ValueError(f"counts must be whole and not below 0, but are {counts}")
    return counts


def _check(path: Path) -> None:
    """Raises ValueError or OSError where nothing can be added to the file ``path``."""
    if path.exists():
        read(path)
    check_writable(path)


def _add(path: Path, more: Counter[tuple[Problem, str]]) -> None:
    """The file is replaced as a whole, under a lock of its folder."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError, ImportError):  # a file system, or a system, without locks
            import fcntl

            fcntl.flock(folder, fcntl.LOCK_EX)
        total = merged([_by_problem(more), *([read(path)] if path.exists() else [])])
        entries = [{"problem": p._asdict(), **counts} for p, counts in sorted(total.items())]
        with replacing(path) as file:
            json.dump({"format": FORMAT, "version": VERSION, "problems": entries}, file, indent=1)
            file.write("\n")
    finally:
        os.close(folder)


def _by_problem(counts: Counter[tuple[Problem, str]]) -> dict[Problem, dict[str, int]]:
    found: dict[Problem, dict[str, int]] = {}
    for (problem, kind), count in counts.items():
        found.setdefault(problem, dict.fromkeys(PASSES, 0))[kind] += count
    return found
