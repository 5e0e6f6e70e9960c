"""Is a candidate right, and how fast? Each by itself, and the fastest in the last race against the default."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsek_tune.db.store import Measured
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune.channel import WorkerError
from sparsek_tune.tune.measure import PROTOCOL, Estimate
from sparsek_tune.tune.pool import Compiled, settled
from sparsek_tune.tune.record import failed, timed
from sparsek_tune.tune.types import Part

if TYPE_CHECKING:
    from sparsek_tune.tune.search import Search

_HOPELESS = 1.5  # a candidate whose whole interval lies above this multiple of the best is not sampled further


def measured(search: Search, config: Config, compiled: Compiled, cases: bool) -> Measured:
    """Verify and time one compiled candidate. cases: see ``Stage.verify``."""
    spent = {"compile_seconds": round(compiled.seconds, 3)}
    protocol = {**PROTOCOL, "kernels": [k._asdict() for k in compiled.kernels], **spent}
    verify = partial(search.run.bench.verify, search.spec, config, cases)
    if (wrong := _wrong(compiled, verify, protocol)) is not None:
        return wrong
    search.passed.add(config)
    best = search.ledger.best_ms
    hopeless, seconds = math.inf if best is None else _HOPELESS * best, search.run.effort.sample_seconds
    try:
        return timed(search.run.bench.measure(search.spec, config, seconds, hopeless), protocol)
    except WorkerError as error:
        return failed(error.status, str(error), protocol)


def right(search: Search, config: Config) -> bool:
    """Whether ``config`` is right on the small problems; recorded if not."""
    verify = partial(search.run.bench.verify_cases, search.spec, config)
    wrong = _wrong(search.cases(config).result(), verify, PROTOCOL)
    if wrong is not None:
        search.record(config, wrong)
    return wrong is None


def finalists(search: Search, cases: bool) -> list[Config]:
    """The fastest but for the default, unless they do not compile or are wrong here: others may have timed them. cases:
    on the small problems too."""
    ranking = [c for c in search.ledger.ranking() if c != search.default]
    needed: tuple[Part, ...] = ("length", "cases") if cases else ("length",)
    found: list[Config] = []
    while ranking and (places := search.run.effort.finalists - len(found)) > 0:
        best, ranking = ranking[:places], ranking[places:]
        compiling = {c: [search.run.pool.submit(search.spec, c, part) for part in needed] for c in best}
        for config, parts in compiling.items():
            known = config in search.passed and not cases
            verify = partial(search.run.bench.verify, search.spec, config, cases)
            if not known and (wrong := _wrong(settled(parts), verify, PROTOCOL)) is not None:
                search.record(config, wrong)
            else:
                found.append(config)
    return found


def contest(search: Search, finalists: list[Config]) -> dict[Config, Estimate]:
    """Race results, the default's first, all recorded. Where the race breaks, each finalist meets the default alone, to
    tell who."""
    everyone = [search.default, *finalists]
    try:
        results = dict(zip(everyone, _race(search, everyone), strict=True))
    except WorkerError as error:
        if not finalists:
            _fail(search, search.default, error)
            return {}
        if len(finalists) == 1:
            _fail(search, finalists[0], error)
            return contest(search, [])
        survivors = [c for c in finalists if c in contest(search, [c])]
        return contest(search, survivors if len(survivors) < len(finalists) else survivors[:1])
    for config, result in results.items():
        search.ledger.add(config, timed(result, {**PROTOCOL, "phase": "race", "contenders": len(everyone)}))
    return results


def _race(search: Search, configs: list[Config]) -> list[Estimate]:
    return search.run.bench.race(search.spec, configs, search.run.effort.race_seconds, search.seed)


def _fail(search: Search, config: Config, error: WorkerError) -> None:
    search.ledger.add(config, failed(error.status, f"in the race: {error}", PROTOCOL))


def _wrong(compiled: Compiled, verify: Callable[[], str | None], protocol: Mapping[str, Any]) -> Measured | None:
    """What is to be recorded of a config that does not compile or is not right, or None."""
    if compiled.status != "ok":
        return failed(compiled.status, compiled.reason, protocol)
    try:
        wrong = verify()
    except WorkerError as error:
        return failed(error.status, str(error), protocol)
    return None if wrong is None else failed("wrong", wrong, protocol)
