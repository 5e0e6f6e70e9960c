"""What a worker process asks of a template at a problem. Loads neither torch nor triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune.measure import Sample
from sparsek_tune.tune.types import Kernel, Part, Spec

FACTORY = "sparsek_tune.tune.stages:make"  # "module:function" that takes a Spec and a mode, and gives a Stage


class Stage(Protocol):
    """One template at one problem in a worker process."""

    def prepare(self) -> None:
        """Set up what all candidates share: inputs, results of the companions, reference results."""
        ...

    def kernels(self, config: Config, part: Part) -> Mapping[str, Callable[[], Kernel]]:
        """What compiles each kernel of the candidate, and launches none, by keys that are equal in all processes.

        part: "length", what is timed; "cases", what ``verify`` runs on small problems; "setup", what the measuring
        process runs before any candidate.
        """
        ...

    def verify(self, config: Config, cases: bool = True) -> str | None:
        """Why the candidate's results are wrong, or None. Raises MemoryCorrupted where it wrote out of its buffers.

        cases: on small problems with known answers too, and not at the timed length alone.
        """
        ...

    def verify_cases(self, config: Config) -> str | None:
        """As ``verify``, on the small problems alone; :meth:`prepare` is not needed."""
        ...

    def check(self) -> None:
        """Raise MemoryCorrupted where a candidate changed what all candidates share, as far as that is there."""
        ...

    def sampler(self, config: Config) -> Sample:
        """Run and warm up the candidate; times it from then on."""
        ...


class StageCache:
    """Keeps the stage of the last spec: a run stays at one spec for many candidates, and its tensors are large.

    A function ``warm_up(mode)`` in the factory's module does at once what no spec is needed for.
    """

    def __init__(self, factory: str, mode: str) -> None:
        name, _, function = factory.partition(":")
        module = importlib.import_module(name)
        self._make, self._mode = getattr(module, function), mode
        getattr(module, "warm_up", lambda mode: None)(mode)
        self._spec: Spec | None = None
        self._stage: Any = None

    def get(self, spec: Spec) -> Stage:
        if spec != self._spec:
            self._spec = self._stage = None  # free the old tensors first; and keep nothing half prepared
            stage = self._make(spec, self._mode)
            stage.prepare()
            self._stage, self._spec = stage, spec
        return self._stage

    def beside(self, spec: Spec) -> Stage:
        """For a moment, and not prepared: the kept one stays."""
        return self._stage if spec == self._spec else self._make(spec, self._mode)

    def check(self) -> None:
        """Of the kept stage, if there is one: see ``Stage.check``."""
        if self._stage is not None:
            self._stage.check()
