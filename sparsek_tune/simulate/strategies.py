"""The strategies by name: the tuner's own search with each of its samplers, the cost model alone, and Helion's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.simulate import external
from sparsek_tune.simulate.landscape import Landscape
from sparsek_tune.simulate.replay import Strategy
from sparsek_tune.tune import samplers, static
from sparsek_tune.tune.propose import Proposals

STATIC = "static"
STRATEGIES: tuple[str, ...] = (*samplers.SAMPLERS, STATIC, *external.ALGORITHMS)


@contextmanager
def made(name: str, landscape: Landscape, trials: int, first: Sequence[Config], seed: int) -> Iterator[Strategy]:
    """The strategy called ``name`` (of ``STRATEGIES``). first: configs to look at before all others.

    Raises ValueError for an unknown name, and for one whose packages are not installed.
    """
    if name == STATIC:
        yield Listed([*first, *by_cost(landscape)])
    elif name in external.ALGORITHMS:
        with closing(external.Helion(name, landscape, first, seed)) as search:
            yield search
    else:
        where = (landscape.template, landscape.problem, landscape.device)
        yield Proposals(*where, trials, first=first, seed=seed, sampler=name)


def missing_packages(name: str) -> list[str]:
    """What the strategy called ``name`` needs and is not installed."""
    return external.missing_packages() if name in external.ALGORITHMS else samplers.missing_packages(name)


class Listed:
    """Configs in a given order, whatever their times."""

    def __init__(self, configs: Iterable[Config]) -> None:
        self._configs = iter(dict.fromkeys(configs))

    def ask(self) -> Config | None:
        return next(self._configs, None)

    def tell(self, config: Config, ms: float | None) -> None:
        pass


def by_cost(landscape: Landscape) -> list[Config]:
    """Cheapest first by the template's cost model; of equals, in the order of the space."""
    configs = landscape.template.feasible(landscape.problem, landscape.device)
    return sorted(configs, key=lambda c: static.roofline(landscape.kernel, c, landscape.problem, landscape.device.cc))
