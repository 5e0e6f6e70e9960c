"""Which config serves a problem: the best stored one that is close enough, else the default, and always why.

:func:`resolve` reads the database and explains; :func:`configs` is the hot path in front of it, one dict hit. Nothing
here tunes, and nothing raises because of a database: a kernel without a stored config runs with its default.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sparsek_tune.db import reader
from sparsek_tune.db.reader import Entry, Winners
from sparsek_tune.problem import Device, Problem, current_device

if TYPE_CHECKING:  # the package of the templates imports triton
    from sparsek_tune.kernel_templates.base import Config, Template

GRADES = ("exact", "near", "shipped", "static", "default")
HARD = ("dtype", "d", "g", "gate")
MAX_OCTAVES = {"n": 2.0, "rows": 2.0, "k": 1.0, "w": 1.0}  # how far, in powers of two, a stored config may be moved
OTHER_GPU = 1.0  # what another GPU of the same compute capability adds to the distance


@dataclass(frozen=True)
class Resolution:
    """The config of one kernel. grade: one of GRADES; reason: a sentence; distance: octaves from where it was tuned."""

    config: Config
    grade: str
    reason: str
    distance: float = 0.0


class Candidate(NamedTuple):
    """A stored config and what became of it for one problem on one device. grade, distance (octaves; inf where a field
    that must match does not): how good a match it is; refused: why it may not serve, "" where it may."""

    entry: Entry
    grade: str
    distance: float
    refused: str


class Plan(Mapping[str, Resolution]):
    """Template name to Resolution, in tuning order, for one problem on one device; read-only."""

    def __init__(self, problem: Problem, device: Device, resolutions: Mapping[str, Resolution]) -> None:
        self.problem, self.device = problem, device
        self._resolutions = dict(resolutions)

    def __getitem__(self, template: str) -> Resolution:
        return self._resolutions[template]

    def __iter__(self) -> Iterator[str]:
        return iter(self._resolutions)

    def __len__(self) -> int:
        return len(self._resolutions)

    @property
    def configs(self) -> dict[str, Config]:
        return {name: r.config for name, r in self.items()}


def resolve(
    problem: Problem,
    device: Device,
    path: str | PathLike[str] | None = None,
    *,
    templates: Mapping[str, Template] | None = None,
    shipped: Path | None = None,
) -> Plan:
    """The config of every kernel for ``problem`` on ``device``, from the files as they are now.

    path: the database (None: the default file). templates: what to resolve; shipped: the directory of shipped configs
    (None: the package's, both). Never raises because of a file; the reasons say what was wrong with it.
    """
    return _plan(problem, device, _read(device, path, shipped), _templates() if templates is None else templates)


def explain(
    problem: Problem,
    device: Device,
    path: str | PathLike[str] | None = None,
    *,
    templates: Mapping[str, Template] | None = None,
    shipped: Path | None = None,
) -> dict[str, list[Candidate]]:
    """Template name to every stored config of that kernel, those of other GPUs included, best first: the first one that
    is not refused is what :func:`resolve` serves. Arguments as there."""
    stored = _read(device, path, shipped, anywhere=True)
    templates = _templates() if templates is None else templates
    return {name: candidates(t, problem, device, stored.entries) for name, t in templates.items()}


# --- the hot path: process-wide, because backward passes run on threads of PyTorch's own

_configs: dict[tuple[int, Problem], dict[str, Config]] = {}
_devices: dict[int, Device] = {}
_stored: dict[int, Winners] = {}
_forced: Mapping[str, Config] | None = None
_warned = False
_numbers = itertools.count()
generation = next(_numbers)  # another number whenever :func:`configs` may answer otherwise than it did


def configs(problem: Problem, index: int) -> dict[str, Config]:
    """Template name to Config for ``problem`` on CUDA device ``index``; do not change it.

    The database is read once per process and device. A first call inside a CUDA graph capture returns the defaults,
    reads no database and remembers nothing. Raises RuntimeError where there is no CUDA device.
    """
    if _forced is not None:
        return _with_forced(problem, index, _forced)
    found = _configs.get((index, problem))
    return _miss(problem, index) if found is None else found


def clear() -> None:
    """Forget what was read, so that the next call sees what has been tuned since."""
    global generation
    generation = next(_numbers)
    _configs.clear()
    _devices.clear()
    _stored.clear()


@contextmanager
def override(configs: Mapping[str, Config]) -> Iterator[None]:
    """Within the block, :func:`configs` returns these configs on every thread; kernels not named resolve as before.

    Blocks nest. For tuning and tests; not for two threads at once.
    """
    global _forced, generation
    before = _forced
    _forced, generation = {**(before or {}), **configs}, next(_numbers)
    try:
        yield
    finally:
        _forced, generation = before, next(_numbers)


def _with_forced(problem: Problem, index: int, forced: Mapping[str, Config]) -> dict[str, Config]:
    if _templates().keys() <= forced.keys():
        return dict(forced)
    found = _configs.get((index, problem))
    return {**(_miss(problem, index) if found is None else found), **forced}


def _miss(problem: Problem, index: int) -> dict[str, Config]:
    device = _devices.get(index) or _devices.setdefault(index, current_device(index))
    if _capturing():
        return {name: template.default(problem, device) for name, template in _templates().items()}
    stored = _stored.get(index) or _stored.setdefault(index, _read(device, None, None))
    if stored.broken:
        _warn(stored.reason)
    found = _plan(problem, device, stored, _templates()).configs
    return _configs.setdefault((index, problem), found)


def _capturing() -> bool:
    import torch

    return torch.cuda.is_current_stream_capturing()


def _warn(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"sparsek_tune: {reason}. Kernels without a stored config run with their defaults.", stacklevel=4)


def _templates() -> Mapping[str, Template]:
    from sparsek_tune.kernel_templates import TEMPLATES

    return TEMPLATES


def _config(key: str) -> Config:
    from sparsek_tune.kernel_templates.base import Config

    return Config.from_key(key)


# --- the choice


def _read(device: Device, path: str | PathLike[str] | None, shipped: Path | None, anywhere: bool = False) -> Winners:
    """The user's winners and the shipped ones, with the reasons of both; ``anywhere``: of all compute capabilities."""
    cc = None if anywhere else device.cc
    own = reader.load(path, device.kind, cc)
    ours = reader.load_shipped(device.kind, cc, shipped)
    reason = "; ".join(filter(None, (own.reason, ours.reason)))
    return Winners(own.entries + ours.entries, reason, own.broken or ours.broken)


def _plan(problem: Problem, device: Device, stored: Winners, templates: Mapping[str, Template]) -> Plan:
    return Plan(problem, device, {name: _choose(t, problem, device, stored) for name, t in templates.items()})


def _choose(template: Template, problem: Problem, device: Device, stored: Winners) -> Resolution:
    found = candidates(template, problem, device, stored.entries)
    for entry, grade, distance, refused in found:
        if not refused:
            reason = _sentence(entry, grade, distance, template, problem, device)
            reason = f"{reason}; {stored.reason}" if stored.broken else reason
            return Resolution(_config(entry.config), grade, reason, distance)
    refused = Counter(c.refused for c in found)
    return Resolution(template.default(problem, device), "default", _apology(refused, stored.reason))


def candidates(template: Template, problem: Problem, device: Device, entries: Iterable[Entry]) -> list[Candidate]:
    """Best by grade, distance, fewest version differences, then newest, then config text; refused ones last."""
    found: list[Candidate] = []
    for entry in entries:
        if entry.template == template.name:
            try:
                why, distance = _mismatch(entry, template, problem, device)
                why = why or unusable(entry, template, problem, device)
            except Exception as error:  # whatever is in a file: the others may serve
                why, distance = f"not readable ({error})", math.inf
            found.append(Candidate(entry, _grade(entry, distance), distance, why))
    found.sort(key=lambda c: c.entry.config)
    found.sort(key=lambda c: c.entry.created_at, reverse=True)
    found.sort(
        key=lambda c: (
            bool(c.refused), GRADES.index(c.grade), c.distance, len(_differences(c.entry.device, device)),
        )
    )  # fmt: skip
    return found


def foreign(entry: Entry, template: Template, problem: Problem, device: Device) -> str:
    """Why ``entry`` says nothing of ``problem``, however near; "" where its distance counts."""
    if entry.device.cc != device.cc:
        return "for another compute capability"
    if entry.source_hash != template.source_hash:
        return "from another version of the kernel's source"
    wanted = problem.project(template.fields)
    differ = (name for name in HARD if getattr(entry.problem, name) != getattr(wanted, name))
    return next((f"for another {name}" for name in differ), "")


def _mismatch(entry: Entry, template: Template, problem: Problem, device: Device) -> tuple[str, float]:
    """Why ``entry`` must not serve ("" if it may); its distance in octaves."""
    if why := foreign(entry, template, problem, device):
        return why, math.inf
    wanted = problem.project(template.fields)
    total, far = 0.0, ""
    for name, most in MAX_OCTAVES.items():
        octaves = _octaves(getattr(entry.problem, name), getattr(wanted, name))
        if octaves > most:
            far = far or f"too far away in {name}"
        total += octaves
    return far, total + (0.0 if entry.static or _same_gpu(entry.device, device) else OTHER_GPU)


def _octaves(a: int, b: int) -> float:
    """|log2(a / b)|; no window and some window, as 0 and more in general, are infinitely far apart."""
    if a == b:
        return 0.0
    return abs(math.log2(a / b)) if a > 0 and b > 0 else math.inf


def _same_gpu(a: Device, b: Device) -> bool:
    return (a.name, a.sm_count) == (b.name, b.sm_count)


def _grade(entry: Entry, distance: float) -> str:
    if entry.static:
        return "static"
    if entry.shipped:
        return "shipped"
    return "exact" if distance == 0 else "near"


def unusable(entry: Entry, template: Template, problem: Problem, device: Device) -> str:
    """Why the config of ``entry`` cannot run here, however near; "" where it can."""
    try:
        config = _config(entry.config)
        if not template.contains(config):
            return "not in the kernel's search space"
    except (ValueError, TypeError):
        return "not a readable config"
    why = template.check(config, problem, device)
    return f"infeasible here ({why})" if why else ""


def _differences(a: Device, b: Device) -> list[str]:
    """The software versions in which ``a`` and ``b`` differ, in words."""
    fields = ("driver", "cuda", "triton", "torch")
    pairs = ((f, getattr(a, f), getattr(b, f)) for f in fields)
    return [f"{f} {x or 'unknown'} instead of {y or 'unknown'}" for f, x, y in pairs if x != y]


def _sentence(entry: Entry, grade: str, distance: float, template: Template, problem: Problem, device: Device) -> str:
    words = [f"{_MADE.get(grade, 'measured on')} {entry.device.name}"]
    if not entry.static and not _same_gpu(entry.device, device):
        words.append(f"not on {device.name}")
    wanted = problem.project(template.fields)
    moved = [f for f in MAX_OCTAVES if getattr(entry.problem, f) != getattr(wanted, f)]
    if moved:
        at = ", ".join(f"{f}={getattr(entry.problem, f)} instead of {getattr(wanted, f)}" for f in moved)
        words.append(f"at {at}")
    else:
        words.append("for this very problem")
    if distance:
        words.append(f"distance {distance:g}")
    if versions := _differences(entry.device, device):
        words.append(f"with {', '.join(versions)}")
    return ", ".join(words)


_MADE = {"static": "ranked by the cost model for", "shipped": "shipped with the package, measured on"}


def _apology(refused: Counter[str], reason: str) -> str:
    counts = "; ".join(f"{n} stored {'config is' if n == 1 else 'configs are'} {why}" for why, n in refused.items())
    return "no stored config serves: " + ("; ".join(filter(None, (counts, reason))) or "none is of this kernel")
