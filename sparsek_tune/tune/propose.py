"""Which config to try next: every one where the space is small, Optuna's TPE (ask and tell) where it is not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

import optuna

from sparsek_tune.kernel_templates.base import Config, Template
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune import samplers
from sparsek_tune.tune.space import neighbours, parameters, suggest

ENUMERABLE = 200_000  # points of a space up to which its feasible part is listed
_MISSES = 16  # proposals in a row that bring nothing new, after which the sampler is passed over once
_REPEATS = 3  # seen configs in a row, after which one of their neighbours is taken

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
        sampler: str = "tpe",
    ) -> None:
        self._template = template
        self._check = lambda config: template.check(config, problem, device)
        self._seen = dict(known or {})
        self._left = max(0, trials - len(self._seen))
        self._rng = random.Random(seed)
        self._open: dict[Config, optuna.trial.Trial] = {}
        self._slowest = 0.0
        self._first = [c for c in dict.fromkeys(first) if template.contains(c) and self._check(c) is None]
        self._rest: list[Config] | None = None
        if template.size <= ENUMERABLE:
            self._rest = list(template.feasible(problem, device))
            self._rng.shuffle(self._rest)
        small = self._rest is not None and len(self._rest) <= trials
        chosen = None if small else samplers.make(sampler, template, problem, device, seed)
        self._study = None if chosen is None else optuna.create_study(sampler=chosen)
        if self._study is not None:
            for config, ms in sorted(self._seen.items(), key=lambda known: known[1] is None):
                if template.contains(config):
                    self._teach(config, ms)

    @property
    def total(self) -> int:
        """How many configs this search looks at, known ones included (an upper bound)."""
        everything = len(set(self._rest) | set(self._seen)) if self._rest is not None else self._left + len(self._seen)
        return min(everything, self._left + len(self._seen))

    @property
    def beginning(self) -> bool:
        """Whether one of ``first`` comes next."""
        return any(config not in self._seen for config in self._first)

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
        """The time (ms) of a config that was asked for here or elsewhere; None where it gave none (infeasible, wrong,
        crashed, hung)."""
        if config not in self._seen:  # another process's
            self._left -= 1
        self._seen[config] = ms
        trial = self._open.pop(config, None)
        if trial is not None:
            self._finish(trial, ms)
        elif self._study is not None:
            self._teach(config, ms)

    def again(self, config: Config) -> None:
        """Propose a config once more, next of all: nothing came of it."""
        del self._seen[config]
        self._left += 1
        self._first.insert(0, config)
        if (trial := self._open.pop(config, None)) is not None and self._study is not None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

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
        self._study.enqueue_trial(parameters(self._template, config))
        trial = self._study.ask()
        suggest(self._template, trial)
        self._finish(trial, ms)

    def _finish(self, trial: optuna.trial.Trial, ms: float | None) -> None:
        assert self._study is not None
        samplers.constrain(trial, works=ms is not None)
        # A failed trial would teach the sampler nothing: complete it with a violated constraint. Its value is one that
        # others have: a model of all values would be bent by an outlier.
        self._slowest = max(self._slowest, ms or 0.0)
        self._study.tell(trial, self._slowest if ms is None else ms)


def spread(configs: Sequence[Config], count: int, seed: int) -> list[Config]:
    """``count`` of ``configs`` (all where there are fewer): the first quarter of them in order, the rest at random."""
    head = list(itertools.islice(configs, max(1, count // 4)))
    tail = list(configs[len(head) :])
    random.Random(seed).shuffle(tail)
    return (head + tail)[:count]
