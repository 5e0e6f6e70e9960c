"""Which config to try next: every one where the space is small, Optuna's TPE (ask and tell) where it is not."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import optuna

from sparsek_tune.kernel_templates.base import Choice, Config, Pow2, Template, Value
from sparsek_tune.problem import Device, Problem

ENUMERABLE = 200_000  # points of a space up to which its feasible part is listed
_MISSES = 64  # proposals in a row that bring nothing new, after which the sampler is passed over once
_REPEATS = 3  # seen configs in a row, after which one of their neighbours is taken
_BAD_MS = 1e6  # value told for a config without a time; the violated constraint is what counts
_SEPARATE = hasattr(optuna.trial.Trial, "set_constraint")  # Optuna 5; before: constraints_func

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Proposals:
    """Configs to try for one template at one problem: at most ``trials``, those in ``known`` included.

    known: what earlier runs found: config to time in ms, None where it gave none. Those are never proposed again, but
    teach the sampler. first: configs to propose before all others (the default, winners of like problems).
    Equal arguments and equal answers give equal proposals.
    """

    def __init__(
        self,
        template: Template,
        problem: Problem,
        device: Device,
        trials: int,
        *,
        known: Mapping[Config, float | None] | None = None,
        first: Iterable[Config] = (),
        seed: int = 0,
    ) -> None:
        self._template = template
        self._check = lambda config: template.check(config, problem, device)
        self._seen = dict(known or {})
        self._left = max(0, trials - len(self._seen))
        self._rng = random.Random(seed)
        self._open: dict[Config, optuna.trial.Trial] = {}
        self._first = [c for c in dict.fromkeys(first) if template.contains(c) and self._check(c) is None]
        self._rest: list[Config] | None = None
        if template.size <= ENUMERABLE:
            self._rest = list(template.feasible(problem, device))
            self._rng.shuffle(self._rest)
        small = self._rest is not None and len(self._rest) <= trials
        self._study = None if small else _study(seed)
        if self._study is not None:
            for config, ms in self._seen.items():
                if template.contains(config):
                    self._teach(config, ms)

    @property
    def total(self) -> int:
        """How many configs this search looks at, known ones included (an upper bound)."""
        everything = len(set(self._rest) | set(self._seen)) if self._rest is not None else self._left + len(self._seen)
        return min(everything, self._left + len(self._seen))

    def ask(self) -> Config | None:
        """A config that was not seen before and passes the template's check, or None: the search is over."""
        if self._left <= 0:
            return None
        for source in (self._next_first, self._next_sampled, self._next_listed):
            if (config := source()) is not None:
                self._left -= 1
                self._seen[config] = None
                return config
        return None

    def tell(self, config: Config, ms: float | None) -> None:
        """The time (ms) of a config that was asked for; None where it gave none (infeasible, wrong, crashed, hung)."""
        self._seen[config] = ms
        trial = self._open.pop(config, None)
        if trial is not None:
            self._finish(trial, ms)
        elif self._study is not None:
            self._teach(config, ms)

    def _next_first(self) -> Config | None:
        while self._first:
            if (config := self._first.pop(0)) not in self._seen:
                return config
        return None

    def _next_listed(self) -> Config | None:
        while self._rest:
            if (config := self._rest.pop()) not in self._seen:
                return config
        return None

    def _next_sampled(self) -> Config | None:
        if self._study is None:
            return None
        repeats: list[Config] = []
        for _ in range(_MISSES):
            trial = self._study.ask()
            config = suggest(self._template, trial)
            if config in self._seen:
                # No second value for a config: the trial is dropped. Where the sampler insists, it has found a region
                # that it likes; what is left to look at there is one step away.
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                repeats.append(config)
                if len(repeats) >= _REPEATS and (near := self._neighbour(repeats[-_REPEATS:])) is not None:
                    return near
            elif self._check(config) is not None:
                self._finish(trial, None)
            else:
                self._open[config] = trial
                return config
        return None

    def _neighbour(self, configs: Sequence[Config]) -> Config | None:
        """An unseen config of the space that differs from one of ``configs`` in one parameter, by one step."""
        near = [n for c in dict.fromkeys(configs) for n in neighbours(self._template, c)]
        near = [n for n in dict.fromkeys(near) if n not in self._seen and self._check(n) is None]
        return self._rng.choice(near) if near else None

    def _teach(self, config: Config, ms: float | None) -> None:
        assert self._study is not None
        self._study.enqueue_trial(_parameters(self._template, config))
        trial = self._study.ask()
        suggest(self._template, trial)
        self._finish(trial, ms)

    def _finish(self, trial: optuna.trial.Trial, ms: float | None) -> None:
        assert self._study is not None
        violation = 1.0 if ms is None else -1.0
        if _SEPARATE:
            trial.set_constraint("works", violation)
        else:
            trial.set_user_attr("works", violation)
        # A failed trial would teach the sampler nothing: complete it with a violated constraint.
        self._study.tell(trial, _BAD_MS if ms is None else ms)


def suggest(template: Template, trial: Any) -> Config:
    """The config that an Optuna trial stands for: powers of two by exponent, choices by position, conditions kept."""
    chosen: dict[str, Value] = {}
    for param in template.space:
        values = param.values(chosen)
        if len(values) == 1:
            chosen[param.name] = values[0]
        elif isinstance(param.domain, Pow2):
            low = values[0].bit_length() - 1  # type: ignore[union-attr]
            chosen[param.name] = 1 << trial.suggest_int(f"log2 {param.name}", low, low + len(values) - 1)
        else:
            chosen[param.name] = values[trial.suggest_categorical(param.name, list(range(len(values))))]
    return Config(chosen)


def _parameters(template: Template, config: Config) -> dict[str, int]:
    """The Optuna parameters that make :func:`suggest` give ``config``."""
    parameters: dict[str, int] = {}
    chosen: dict[str, Value] = {}
    for param in template.space:
        values, value = param.values(chosen), config[param.name]
        chosen[param.name] = value
        if len(values) > 1 and isinstance(param.domain, Pow2):
            parameters[f"log2 {param.name}"] = int(value).bit_length() - 1
        elif len(values) > 1:
            parameters[param.name] = values.index(value)
    return parameters


def _study(seed: int) -> optuna.Study:
    options: dict[str, Any] = {"seed": seed, "multivariate": True, "group": True, "constant_liar": True}
    if not _SEPARATE:
        options["constraints_func"] = lambda trial: (trial.user_attrs.get("works", 0.0),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.create_study(sampler=optuna.samplers.TPESampler(**options))


def neighbours(template: Template, config: Config) -> Iterator[Config]:
    """The configs of the space one step away: the next power of two up or down, any other choice."""
    for i, param in enumerate(template.space):
        values = param.values(config)
        at = values.index(config[param.name])
        near = range(len(values)) if isinstance(param.domain, Choice) else (at - 1, at + 1)
        for j in near:
            if 0 <= j < len(values) and j != at:
                yield _settled(template, {**config, param.name: values[j]}, i)


def _settled(template: Template, config: Mapping[str, Value], changed: int) -> Config:
    """``config`` with the parameters after number ``changed`` put at their first value where they do not matter."""
    chosen = {p.name: config[p.name] for p in template.space[: changed + 1]}
    for param in template.space[changed + 1 :]:
        values, value = param.values(chosen), config[param.name]
        chosen[param.name] = value if value in values else values[0]
    return Config(chosen)


def spread(configs: Sequence[Config], count: int, seed: int) -> list[Config]:
    """``count`` of ``configs`` (all where there are fewer): the first quarter of them in order, the rest at random."""
    head = list(itertools.islice(configs, max(1, count // 4)))
    tail = list(configs[len(head) :])
    random.Random(seed).shuffle(tail)
    return (head + tail)[:count]
