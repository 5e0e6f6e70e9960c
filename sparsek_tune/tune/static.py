"""Tuning without a GPU: cross-compile for a named target, read the resources, verify in the interpreter, rank by cost.

What comes of it is a guess with evidence: right results at a small shape, few spills, a place in the cost model's
order. It is stored as static and never outranks a measurement.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, NamedTuple

from sparsek_tune.captured import Counts
from sparsek_tune.db.store import Measured
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.peaks import target_peak
from sparsek_tune.problem import Device, Problem, target_device
from sparsek_tune.tune.channel import WorkerError
from sparsek_tune.tune.pool import Compiled
from sparsek_tune.tune.propose import ENUMERABLE, spread
from sparsek_tune.tune.record import failed
from sparsek_tune.tune.types import Kernel, Trial
from sparsek_tune.tune.verify import reduced

if TYPE_CHECKING:
    from sparsek_tune.tune.search import Search

_FEW_WARPS = 8  # resident warps on an SM below which latency shows
_LITTLE_STACK = 64  # bytes of spills a thread that do not show
_MARGIN = 0.9  # the default is left for a config that costs at most this fraction of it
PATIENCE = 4  # times an effort's timeout: a right config may take two minutes in the interpreter
PROTOCOL = {"timer": "none", "statistic": "cost model", "verified": "interpreter, small shape, fp16 for bf16"}


class _Ranked(NamedTuple):
    seconds: float
    config: Config
    kernels: tuple[Kernel, ...]


def search(search: Search) -> None:
    """Static tuning of one template at one problem: the outcome has no times."""
    search.begin()
    known = search.ledger.winner()
    configs = _candidates(search)
    if known is not None and _looked_at(search, Config.from_key(known.config)) >= len(configs):
        search.emit("start", "known")
        search.done(Config.from_key(known.config), None, None, "as stored")
        return
    # What earlier runs did not find infeasible.
    work = [c for c in configs if c not in search.ledger.latest or search.ledger.latest[c].status == "static"]
    search.total, search.looked_at = len(configs), len(configs) - len(work)
    search.emit("start", "")
    ranked = _compile(search, work)
    winner = _first_right(search, _order(ranked, search.default), search.looked_at)
    if winner is not None:
        search.ledger.win(winner, None, None)
    # The store holds what failed and what was verified, not all that compiled.
    search.done(winner, None, None, "" if winner is not None else "no config passed", tried=search.looked_at)


def busiest_first(counts: Counts) -> list[Problem]:
    """Problems by the time that their counted calls take, most first: by the cost models of default configs, for one
    GPU whatever there is, as only the order matters."""
    device = target_device("cuda:90")

    def seconds(problem: Problem) -> float:
        forward, backward = counts[problem]["forward"], counts[problem]["backward"]
        calls = {
            "threshold": forward, "schedule": forward + backward, "forward": forward, "dq": backward, "dkv": backward,
        }  # fmt: skip
        return sum(
            calls[t.name] * roofline(t, t.default(problem, device), problem, device.cc) for t in TEMPLATES.values()
        )

    return sorted(counts, key=seconds, reverse=True)


def cost(search: Search, config: Config, kernels: Sequence[Kernel] = ()) -> float:
    """Seconds by the template's cost model, more where spills or few resident warps slow the kernels down."""
    seconds = roofline(search.template, config, search.problem, search.run.device.cc)
    return seconds * max((_penalty(k, search.run.device) for k in kernels), default=1.0)


def roofline(template: Template, config: Config, problem: Problem, cc: int) -> float:
    return template.cost(config, problem).seconds(*target_peak(cc).of(problem.dtype))


def _penalty(kernel: Kernel, device: Device) -> float:
    warps = resident_warps(kernel, device)
    return max(1.0, (_FEW_WARPS / max(warps, 1)) ** 0.5) * (1 + max(0, kernel.stack - _LITTLE_STACK) / 256)


def resident_warps(kernel: Kernel, device: Device) -> int:
    """Warps that an SM holds at once, by registers and shared memory."""
    by_registers = 65536 // max(1, kernel.registers * 32 * kernel.warps)
    by_shared = device.smem // kernel.shared if kernel.shared else 64
    return min(64, kernel.warps * min(by_registers, by_shared))


def _looked_at(search: Search, winner: Config) -> int:
    """Among how many configs ``winner`` won: a run of more effort looks again."""
    latest = search.ledger.latest.get(winner)
    return 0 if latest is None else int(latest.protocol.get("candidates", 0))


def _candidates(search: Search) -> list[Config]:
    """The default, then some by cost and some at random."""
    template, count = search.template, search.run.effort.static_trials
    if template.size > ENUMERABLE:
        return [search.default]
    others = (c for c in template.feasible(search.problem, search.run.device) if c != search.default)
    return [search.default, *spread(sorted(others, key=lambda c: cost(search, c)), count - 1, search.seed)]


def _compile(search: Search, work: list[Config]) -> list[_Ranked]:
    """What of ``work`` compiles, with its cost."""
    known = search.looked_at or 0
    search.pace.begin(known)
    futures = {search.run.pool.submit(search.spec, c): c for c in work}
    ranked = []
    for count, future in enumerate(_in_time(futures, search), 1):
        config, compiled = futures[future], future.result()
        if compiled.status == "ok":
            ranked.append(_Ranked(cost(search, config, compiled.kernels), config, compiled.kernels))
        else:
            search.ledger.add(config, failed(compiled.status, compiled.reason, PROTOCOL))
        search.looked_at = known + count
        status = "compiled" if compiled.status == "ok" else compiled.status
        search.emit("trial", compiled.reason or status, trial=Trial(config, status, None))
    return ranked


def _in_time(futures: Mapping[Future[Compiled], Config], search: Search) -> Iterator[Future[Compiled]]:
    """Futures as they are done; when the time is over, of the others the default's alone."""
    waiting = set(futures)
    while waiting:
        left = search.end - time.monotonic()
        if left <= 0:
            waiting = {f for f in waiting if futures[f] == search.default or not f.cancel()}
        done, waiting = wait(waiting, left if 0 < left < threading.TIMEOUT_MAX else None, FIRST_COMPLETED)
        yield from done


def _order(ranked: list[_Ranked], default: Config) -> list[_Ranked]:
    """Cheapest first, but the default before all that are not clearly cheaper."""
    at = {r.config: r.seconds for r in ranked}.get(default)

    def key(r: _Ranked) -> tuple[float, str]:
        return (r.seconds if at is None or r.config == default else r.seconds / _MARGIN, r.config.key)

    return sorted(ranked, key=key)


def _first_right(search: Search, ranked: list[_Ranked], candidates: int) -> Config | None:
    """The first config that the interpreter verifies, the best few and then the default; recorded as the best of
    ``candidates``."""
    best = ranked[: search.run.effort.static_finalists]
    best += [r for r in ranked if r.config == search.default and r not in best]
    for r in best:
        if time.monotonic() > search.end and r.config != search.default:
            continue
        status, reason = _verify(search, r.config)
        protocol = {**PROTOCOL, "kernels": [k._asdict() for k in r.kernels], "candidates": candidates}
        if status == "static":
            # The time is the cost model's.
            search.ledger.add(r.config, Measured("static", r.seconds * 1e3, protocol=protocol))
            return r.config
        search.ledger.add(r.config, failed(status, reason, protocol))
        search.emit("note", f"{r.config.key}: {status}: {reason}")
    return None


def _verify(search: Search, config: Config) -> tuple[str, str]:
    """("static", "") or (status, reason). Problems that differ in length alone share the small problem."""
    key = (search.template.name, config, reduced(search.problem, interpreter=True))
    if key not in search.run.verified:
        try:
            wrong = search.run.bench.verify(search.spec, config)
            search.run.verified[key] = ("static", "") if wrong is None else ("wrong", wrong)
        except WorkerError as error:
            search.run.verified[key] = (error.status, str(error))
    return search.run.verified[key]
