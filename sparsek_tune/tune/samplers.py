"""The search strategies by name, as Optuna samplers."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.space import neighbours, parameters, suggest

Factory = Callable[[Template, Problem, Device, int], BaseSampler | None]

_SEPARATE = hasattr(optuna.trial.Trial, "set_constraint")  # Optuna 5; before: constraints_func
_WORKS = "works"  # the constraint that a config without a time violates
_DESCENT = 24  # trials by coordinate descent before TPE
_DRAWS = 1000  # random configs, one after the other, of which one has to be new to start from


def make(name: str, template: Template, problem: Problem, device: Device, seed: int) -> BaseSampler | None:
    """The sampler called ``name`` (of ``SAMPLERS``) for the space of ``template``, None for "exhaustive".

    Raises ValueError for an unknown name, and for one whose packages are not installed.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, but is {name!r}")
    if missing := missing_packages(name):
        raise ValueError(f"sampler {name!r} needs what is not installed: pip install {' '.join(missing)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name](template, problem, device, seed)


def missing_packages(name: str) -> list[str]:
    """What the sampler called ``name`` needs and is not installed."""
    return [package for package in _NEEDS.get(name, ()) if find_spec(package) is None]


def constrain(trial: optuna.trial.Trial, works: bool) -> None:
    """Say whether the config of ``trial`` has a time, before it is told."""
    violation = -1.0 if works else 1.0
    if _SEPARATE:
        trial.set_constraint(_WORKS, violation)
    else:
        trial.set_user_attr(_WORKS, violation)


def works(trial: FrozenTrial) -> bool:
    """What :func:`constrain` said of a trial."""
    said = trial.constraints if _SEPARATE else trial.user_attrs
    return said.get(_WORKS, 0.0) <= 0


def _constraints() -> dict[str, Any]:
    """The option that makes a sampler look at them."""
    return {} if _SEPARATE else {"constraints_func": lambda trial: (trial.user_attrs.get(_WORKS, 0.0),)}


def _tpe(template: Template, problem: Problem, device: Device, seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, **_constraints())


def _gp(template: Template, problem: Problem, device: Device, seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False, **_constraints())


def _cma_es(template: Template, problem: Problem, device: Device, seed: int) -> BaseSampler:
    return _CmaEs(seed=seed, with_margin=True, warn_independent_sampling=False)


def _random(template: Template, problem: Problem, device: Device, seed: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


class _CmaEs(optuna.samplers.CmaEsSampler):
    """Moves along numbers alone: choices are drawn at random, and a violated constraint is a slow time."""

    def after_trial(self, *_: Any) -> None:
        """Optuna's warns, at every trial, that constraints are not looked at."""


class CoordinateSampler(BaseSampler):
    """Coordinate descent: from the default config, one parameter after the other is moved to its best value one step
    away, until a round of all brings nothing; then from a random config, and so on.

    Before every trial the descent is done again from its start over what is known, up to the first config that is not:
    so what earlier runs found counts too, and several trials may be open (one without a result is taken for no gain).
    """

    def __init__(self, template: Template, problem: Problem, device: Device, seed: int) -> None:
        self._template = template
        self._check = lambda config: template.check(config, problem, device) is None
        self._rng = random.Random(seed)
        self._starts = [template.default(problem, device)]
        self._lines_of: dict[Config, list[list[Config]]] = {}
        self._read: set[int] = set()  # trials whose results are in _times
        self._times: dict[Config, float] = {}
        self._asked: set[Config] = set()
        self._plan: tuple[int, dict[str, int]] = (-1, {})  # of the trial with this number

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self._plan[0] != trial.number:
            self._learn(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
            unknown = (c for c in self._descend() if c not in self._times and c not in self._asked)
            config = next(unknown, self._starts[0])
            self._asked.add(config)
            self._plan = (trial.number, parameters(self._template, config))
        return self._plan[1][param_name]

    def _learn(self, trials: list[FrozenTrial]) -> None:
        for trial in trials:
            if trial.number not in self._read:
                self._read.add(trial.number)
                config = suggest(self._template, optuna.trial.FixedTrial(trial.params))
                self._times[config] = trial.values[0] if works(trial) else math.inf

    def _descend(self) -> Iterator[Config]:
        """Every config that the descent looks at; its time is read when the next one is asked for."""
        for start in self._all_starts():
            yield start
            best, gained = start, True
            while gained:
                gained = False
                for number in range(len(self._template.space)):
                    line = self._lines(best)[number]
                    yield from line
                    better = min(line, key=self._time, default=best)
                    if self._time(better) < self._time(best):
                        best, gained = better, True

    def _time(self, config: Config) -> float:
        return self._times.get(config, math.inf)

    def _lines(self, config: Config) -> list[list[Config]]:
        """For every parameter the configs that can run and differ from ``config`` in it by one step."""
        if config not in self._lines_of:
            names = [p.name for p in self._template.space]
            lines: list[list[Config]] = [[] for _ in names]
            for near in filter(self._check, neighbours(self._template, config)):
                lines[next(i for i, name in enumerate(names) if near[name] != config[name])].append(near)
            self._lines_of[config] = lines
        return self._lines_of[config]

    def _all_starts(self) -> Iterator[Config]:
        """The starts so far, then new ones, until chance finds none."""
        yield from self._starts
        for _ in range(_DRAWS):
            config = suggest(self._template, _Chance(self._rng))
            if config not in self._times and config not in self._asked and self._check(config):
                self._starts.append(config)
                yield config


class DescentThenTpe(BaseSampler):
    """Coordinate descent for the first ``_DESCENT`` trials, those known from earlier runs included, then TPE, which has
    their results: the descent finds what is near the default while a model would have nothing to learn from yet."""

    def __init__(self, template: Template, problem: Problem, device: Device, seed: int) -> None:
        self._descent = CoordinateSampler(template, problem, device, seed)
        self._tpe = _tpe(template, problem, device, seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        return self._descent if trial.number < _DESCENT else self._tpe

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, *result: Any) -> None:
        self._tpe.after_trial(study, trial, *result)  # where Optuna keeps constraints by its samplers


class _Chance:
    """Stands for a trial whose parameters are drawn."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self._rng.randint(low, high)

    def suggest_categorical(self, name: str, choices: list[int]) -> int:
        return self._rng.choice(choices)


def _exhaustive(template: Template, problem: Problem, device: Device, seed: int) -> None:
    """Nothing is sampled: the list of all configs is walked through."""


SAMPLERS: dict[str, Factory] = {
    "tpe": _tpe,
    "gp": _gp,
    "cma-es": _cma_es,
    "random": _random,
    "coordinate": CoordinateSampler,
    "descent-tpe": DescentThenTpe,
    "exhaustive": _exhaustive,
}
_NEEDS = {"gp": ("torch", "scipy"), "cma-es": ("cmaes",)}
