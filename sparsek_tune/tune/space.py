"""A template's space in Optuna's terms, and from point to point in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsek_tune.kernel_templates.base import Choice, Config, Pow2, Template, Value


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


def parameters(template: Template, config: Config) -> dict[str, int]:
    """The Optuna parameters that make :func:`suggest` give ``config``."""
    found: dict[str, int] = {}
    chosen: dict[str, Value] = {}
    for param in template.space:
        values, value = param.values(chosen), config[param.name]
        chosen[param.name] = value
        if len(values) > 1 and isinstance(param.domain, Pow2):
            found[f"log2 {param.name}"] = int(value).bit_length() - 1
        elif len(values) > 1:
            found[param.name] = values.index(value)
    return found


def neighbours(template: Template, config: Config) -> Iterator[Config]:
    """The configs of the space one step away: the next power of two up or down, any other choice."""
    for i, param in enumerate(template.space):
        values = param.values(config)
        at = values.index(config[param.name])
        near = range(len(values)) if isinstance(param.domain, Choice) else (at - 1, at + 1)
        for j in near:
            if 0 <= j < len(values) and j != at:
                yield _settled(template, {**config, param.name: values[j]}, i)


def normal(template: Template, config: Mapping[str, Value]) -> Config:
    """``config``, which has a value for every parameter, as a point of the space: those that do not matter at
    their first value."""
    return _settled(template, config, -1)


def _settled(template: Template, config: Mapping[str, Value], changed: int) -> Config:
    """``config`` with the parameters after number ``changed`` put at their first value where they do not matter."""
    chosen = {p.name: config[p.name] for p in template.space[: changed + 1]}
    for param in template.space[changed + 1 :]:
        values, value = param.values(chosen), config[param.name]
        chosen[param.name] = value if value in values else values[0]
    return Config(chosen)
