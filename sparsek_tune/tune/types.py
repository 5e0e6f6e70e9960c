"""The tuner's vocabulary: what a run is asked for (Effort), says on its way (Event) and answers (Row)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Device, Problem


@dataclass(frozen=True)
class Effort:
    """How much work a run puts into one template at one problem, but for ``seconds``.

    trials: configs looked at, those known from earlier runs included; seconds: wall time of all templates at one
    problem, setting up included; sample_seconds: GPU time for timing one config; finalists, race_seconds: size and time
    of the last race; static_trials: configs compiled where there is no GPU; static_finalists: the most of them that are
    verified in the interpreter; timeout: wall seconds for one step (compile, verify, measure) of one candidate, after
    which it is killed (verifying in the interpreter: ``static.PATIENCE`` times that); sampler: a name of
    ``samplers.SAMPLERS``, chosen by docs/simulation.md.
    """

    trials: int
    seconds: float
    sample_seconds: float
    finalists: int
    race_seconds: float
    static_trials: int
    static_finalists: int
    timeout: float = 60.0
    sampler: str = "descent-tpe"


EFFORTS = {
    "quick": Effort(20, 28.0, 0.05, 3, 0.5, 4, 2),
    "default": Effort(80, 160.0, 0.1, 5, 1.0, 6, 2),
    "full": Effort(400, 3600.0, 0.25, 8, 3.0, 48, 6, sampler="tpe"),
    "exhaustive": Effort(1_000_000, 7 * 86400.0, 0.1, 8, 3.0, 1_000_000, 6),  # the whole space, however long it takes
}


class Row(NamedTuple):
    """The outcome for one template at one problem (blank fields: the template does not depend on them).

    Times in ms, None where nothing was timed (static tuning). tried counts the configs of this problem with a result,
    from earlier runs too; infeasible, wrong and failed are those among them that cannot run here, gave a wrong result,
    crashed or hung. config: the winner, None where not even the default works.
    """

    problem: Problem
    template: str
    default_ms: float | None
    tuned_ms: float | None
    speedup: float | None
    tried: int
    infeasible: int
    wrong: int
    failed: int
    config: Config | None


def row_of(fields: Mapping[str, Any]) -> Row:
    """A row from its JSON form."""
    config = None if fields["config"] is None else Config(fields["config"])
    return Row(**{**fields, "problem": Problem(**fields["problem"]), "config": config})


class Trial(NamedTuple):
    """One config settled. status: as in ``db.store.Measured``, or "compiled" (static tuning: works so far, not
    verified); median_ms: of "ok" alone."""

    config: Config
    status: str
    median_ms: float | None


class Event(NamedTuple):
    """One step of progress. kind: "start" and "done" frame a template at a problem, "trial" is one config settled,
    "race" the final comparison, "note" a message for the user.

    done of total counts configs, those known before included; best_ms so far, default_ms of the default config; rate:
    configs a second in this search, of a "trial" alone; seconds_left of the kernel (None: unknown). trial and row: what
    a "trial" or "done" came to. kernels_done of kernels, run_seconds_left: of the whole run. ``event.schema.json``
    describes the JSON form.
    """

    kind: str
    template: str
    problem: Problem
    done: int
    total: int
    best_ms: float | None
    message: str
    default_ms: float | None = None
    rate: float | None = None
    seconds_left: float | None = None
    trial: Trial | None = None
    row: Row | None = None
    kernels_done: int = 0
    kernels: int = 0
    run_seconds_left: float | None = None


class Spec(NamedTuple):
    """What a worker process needs to set up one template at one problem; picklable.

    companions: one config per template, for the kernels that run before or with the tuned one.
    """

    template: str
    problem: Problem
    device: Device
    companions: dict[str, Config]


# Kernels of a candidate: what the measuring process runs before it, whichever it is; what is timed; what it is verified
# with on small problems.
Part = Literal["setup", "length", "cases"]


class Kernel(NamedTuple):
    """Resources of a compiled kernel: registers and stack bytes (spills) a thread, shared memory (bytes), warps."""

    name: str
    registers: int
    stack: int
    shared: int
    warps: int


OnEvent = Callable[[Event], Any]
