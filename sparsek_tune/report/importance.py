"""Which parameters of a kernel decide how fast it is: PED-ANOVA, by Optuna, of what was measured.

PED-ANOVA (Watanabe, Bansal and Hutter, 2023) compares how the values of a parameter are distributed among the fastest
tenth of the configs and among all that were tried: it needs no model of the times, allows for a search that tries some
values more often than others, and asks for no package but Optuna, where fANOVA needs scikit-learn.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from sparsek_tune.kernel_templates.base import Config, Value
from sparsek_tune.report.evidence import Search

ENOUGH = 50  # timed configs: five in the fastest tenth, as Optuna advises
ENOUGH_EACH = 10  # at one problem, below which it is left out: its fastest tenth would be no choice
MOST = 1000  # configs that are looked at, evenly chosen, so that a large database takes no longer
SHUFFLES = 19  # random orders that a parameter must stand above: chance alone does that once in 20 times

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Share(NamedTuple):
    """One parameter. share: of all parameters' importance, from 0 to 1; clear: whether it is more than chance gives."""

    name: str
    share: float
    clear: bool


class Importance(NamedTuple):
    """Of one version of a kernel on one GPU. configs, problems: what it rests on; shares: most important first, none
    where there are too few configs."""

    configs: int
    problems: int
    shares: tuple[Share, ...]


def importance(searches: Iterable[Search]) -> Importance:
    """Of the parameters that vary in the timed configs of all searches. Times of different problems are comparable by
    rank alone: a config counts by the share of the configs of its own problem that are faster."""
    ranked = [ranks for s in searches if len(ranks := _ranks(s.times)) >= ENOUGH_EACH]
    configs = sum(map(len, ranked))
    found = [ranks[:: -(-configs // MOST)] for ranks in ranked] if configs > MOST else ranked
    if configs < ENOUGH or not (space := _space([c for ranks in found for c, _ in ranks])):
        return Importance(configs, len(ranked), ())
    return Importance(configs, len(ranked), _shares(found, space))


def _ranks(times: Mapping[Config, float]) -> list[tuple[Config, float]]:
    ordered = sorted(times, key=lambda c: (times[c], c.key))
    return [(c, place / len(ordered)) for place, c in enumerate(ordered)]


def _space(configs: Sequence[Config]) -> dict[str, list[Value]]:
    """The values that were tried of every parameter that all configs have; numbers in order."""
    names = [n for n in configs[0] if all(n in c for c in configs)]
    values = {n: list(dict.fromkeys(c[n] for c in configs)) for n in names}
    return {n: sorted(v) if _ordered(v) else v for n, v in values.items() if len(v) > 1}  # type: ignore[type-var]


def _ordered(values: Iterable[Value]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _shares(found: Sequence[Sequence[tuple[Config, float]]], space: Mapping[str, list[Value]]) -> tuple[Share, ...]:
    study = _study([c for ranks in found for c, _ in ranks], space)
    rng = random.Random(0)

    def evaluate(shuffled: bool) -> dict[str, float]:
        values: list[float] = []
        for ranks in found:
            own = [rank for _, rank in ranks]
            if shuffled:
                rng.shuffle(own)
            values += own
        return _ped_anova(study, values)

    real = evaluate(shuffled=False)
    chance = [evaluate(shuffled=True) for _ in range(SHUFFLES)]
    total = sum(real.values()) or 1.0
    shares = (Share(n, x / total, all(x > other[n] for other in chance)) for n, x in real.items())
    return tuple(sorted(shares, key=lambda s: (-s.share, s.name)))


def _study(configs: Sequence[Config], space: Mapping[str, list[Value]]) -> optuna.Study:
    """A trial for every config, in order. Numbers count by their order alone, so that powers of two stand evenly."""
    distributions: dict[str, BaseDistribution] = {
        n: IntDistribution(0, len(v) - 1) if _ordered(v) else CategoricalDistribution(range(len(v)))
        for n, v in space.items()
    }
    study = optuna.create_study()
    for config in configs:
        parameters = {n: v.index(config[n]) for n, v in space.items()}
        study.add_trial(optuna.create_trial(params=parameters, distributions=distributions, value=0.0))
    return study


def _ped_anova(study: optuna.Study, values: Sequence[float]) -> dict[str, float]:
    """By parameter, where the trials of ``study`` have ``values``, low ones good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and that it takes low values for good
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: values[trial.number], normalize=False
        )
