"""What a worker runs for one template at one problem: inputs made once, everything before it computed once.

``make(spec, mode)`` is the stage factory that the worker processes load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsek_tune import launch, launcher
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.limits import ROWS_MAX
from sparsek_tune.problem import Problem
from sparsek_tune.reference import Selection
from sparsek_tune.tune import sample
from sparsek_tune.tune.compile import kernels_of, later
from sparsek_tune.tune.measure import CudaSampler, Sample
from sparsek_tune.tune.redzone import SIZE, Fingerprint, redzones
from sparsek_tune.tune.stage import Stage
from sparsek_tune.tune.types import Kernel, Part, Spec
from sparsek_tune.tune.verify import SCORES, TOLERANCE, compare, expected, reduced

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Where tensors live, by mode: the compile pool has no device, the interpreter runs kernels on the CPU.
_TORCH_DEVICE = {"compile": "meta", "measure": "cuda", "interpret": "cpu"}


class Inputs(NamedTuple):
    """Tensors of one call of the operator: query, dout [1, Hq, N, D], key, value [1, Hkv, N, D], scores [1, Hkv, N]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    dout: Tensor
    k: int
    window: int
    scale: float
    gate: str


def make_inputs(problem: Problem, device: str, scores: str = "normal", seed: int = 0) -> Inputs:
    """Random inputs at ``problem``. Models store [B, N, H, D] and pass a transposed view, so that is what is timed.

    scores: "normal" (independent, deviation 3: some saturated, some cut, some between), "ties" (few distinct values),
    "equal" (one value) or "rising" (every key displaces the oldest).
    """
    p = problem._replace(rows=min(problem.rows, ROWS_MAX))  # beyond half of the most they were rounded up past it
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty if generator is None else empty.normal_(generator=generator)  # on meta it would take seconds

    def heads(count: int) -> Tensor:
        return normal(1, p.n, count, p.d, dtype=DTYPES[p.dtype]).transpose(1, 2)

    u = normal(1, p.rows, p.n).mul_(3)
    if scores == "ties":
        u.round_().clamp_(-2, 2)
    elif scores == "equal":
        u.fill_(0.5)
    elif scores == "rising":
        u.copy_(torch.arange(p.n, device=device) * 0.03)
    q, k, v, do = heads(p.rows * p.g), heads(p.rows), heads(p.rows), heads(p.rows * p.g)
    return Inputs(q, k, v, u, do, p.k, p.w, p.d**-0.5, p.gate)


class Pipeline:
    """The stages of one call over fixed inputs. Every stage reads the results of the companions before it, so that a
    candidate of one template can be run alone. known: results to use for "selection", "out" and "lse" instead."""

    READ = MappingProxyType({
        "threshold": (), "schedule": ("selection", "lse"), "forward": ("schedule_",), "dq": ("schedule_", "out", "lse"),
        "dkv": ("schedule_", "lse", "dq_results"),
    })  # fmt: skip

    def __init__(
        self, inputs: Inputs, companions: Mapping[str, Config], known: Mapping[str, Any] | None = None
    ) -> None:
        self._i, self._companions = inputs, companions
        self.__dict__.update(known or {})

    @cached_property
    def selection(self) -> Any:
        return launch.threshold(self._i.scores, self._i.k, self._i.window, self._companions["threshold"])

    @cached_property
    def schedule_(self) -> Any:
        return self._schedule(self._companions["schedule"])

    @cached_property
    def _forward_results(self) -> dict[str, Tensor]:
        return self.forward(self._companions["forward"])

    @cached_property
    def out(self) -> Tensor:
        return self._forward_results["out"]

    @cached_property
    def lse(self) -> Tensor:
        return self._forward_results["lse"]

    @cached_property
    def dq_results(self) -> dict[str, Tensor]:
        return self.dq(self._companions["dq"])

    def prepare(self, template: str) -> None:
        """Compute now what candidates of ``template`` read."""
        for name in self.READ[template]:
            getattr(self, name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Inputs and what was computed so far, by name."""
        for name, value in self.__dict__.items():
            yield from _tensors(name, value)

    def run(self, template: str, config: Config) -> dict[str, Tensor]:
        """What is timed: the named outputs of ``template`` at ``config``."""
        return getattr(self, template)(config)

    def outputs(self, template: str, config: Config) -> dict[str, Tensor]:
        """What is verified: as ``run``, and for dq also what dkv makes of it, for gbar shows in du alone."""
        results = self.run(template, config)
        if template == "dq":
            results = {**results, **self._dkv(self.schedule_, results, self._companions["dkv"])}
        return results

    def threshold(self, config: Config) -> dict[str, Tensor]:
        return launch.threshold(self._i.scores, self._i.k, self._i.window, config)._asdict()

    def schedule(self, config: Config) -> dict[str, Tensor]:
        """With its consumers: the length of its segments decides their speed."""
        schedule, companions = self._schedule(config), self._companions
        forward = self._forward(schedule, companions["forward"])
        dq = self._dq(schedule, forward["out"], forward["lse"], companions["dq"])
        return {**forward, **dq, **self._dkv(schedule, dq, companions["dkv"])}

    def forward(self, config: Config) -> dict[str, Tensor]:
        return self._forward(self.schedule_, config)

    def dq(self, config: Config) -> dict[str, Tensor]:
        return self._dq(self.schedule_, self.out, self.lse, config)

    def dkv(self, config: Config) -> dict[str, Tensor]:
        return self._dkv(self.schedule_, self.dq_results, config)

    def _schedule(self, config: Config) -> Any:
        return launch.schedule(self._i.scores, self.selection, self._i.k, self._i.window, config)

    def _forward(self, schedule: Any, config: Config) -> dict[str, Tensor]:
        i = self._i
        out, lse = launch.forward(i.query, i.key, i.value, self.selection, schedule, i.window, i.scale, i.gate, config)
        return {"out": out, "lse": lse}

    def _dq(self, schedule: Any, out: Tensor, lse: Tensor, config: Config) -> dict[str, Tensor]:
        i = self._i
        dq, delta, gbar = launch.dq(
            i.dout, i.query, i.key, i.value, i.scores, out, lse, self.selection, schedule, i.window, i.scale, i.gate,
            config,
        )  # fmt: skip
        return {"dq": dq, "delta": delta, "gbar": gbar}

    def _dkv(self, schedule: Any, dq: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        i = self._i
        dk, dv, du = launch.dkv(
            i.dout, i.query, i.key, i.value, i.scores, self.lse, dq["delta"], dq["gbar"], self.selection, schedule,
            i.window, i.scale, i.gate, config,
        )  # fmt: skip
        return {"dk": dk, "dv": dv, "du": du}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a result: itself, or fields of a named tuple, or values of a mapping."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping) or hasattr(value, "_asdict"):
        for field, part in (value if isinstance(value, Mapping) else value._asdict()).items():
            yield from _tensors(field, part)


def _placed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy where ``redzones`` puts new tensors."""
    return torch.empty_like(t, dtype=dtype).copy_(t)


class _Case(NamedTuple):
    """A small problem with its answer."""

    name: str
    inputs: Inputs
    pipeline: Pipeline
    want: dict[str, Tensor]


class KernelStage:
    """The real stage. mode: "compile" (meta tensors), "measure" (CUDA) or "interpret" (CPU, Triton's interpreter)."""

    def __init__(self, spec: Spec, mode: str) -> None:
        self._spec, self._mode, self._on = spec, mode, _TORCH_DEVICE[mode]
        self._small = reduced(spec.problem, interpreter=mode == "interpret")

    def prepare(self) -> None:
        if self._mode == "compile":
            with launch.dry_run():  # a candidate needs the shapes of what runs before it, not its kernels
                _ = self._full.dq_results, self._meta_small.dq_results
            return
        _ = self._shared_cases
        if self._mode == "measure":
            _ = self._shared_length

    def kernels(self, config: Config, part: Part) -> Mapping[str, Callable[[], Kernel]]:
        return kernels_of(self._launched(config, part))

    def _launched(self, config: Config, part: Part) -> list[Any]:
        """The kernels, as Triton would give them to a launch; none is compiled yet that no result was asked of."""
        template = self._spec.template
        with later(), launch.compile_only() as launched:
            if part == "setup":
                Pipeline(self._full_inputs, self._spec.companions).prepare(template)
            elif part == "cases":
                small = self._meta_small
                known = {"selection": small.selection, "out": small.out, "lse": small.lse}
                small = Pipeline(make_inputs(self._small, self._on), self._small_companions, known)
                small.prepare(template)
                small.outputs(template, config)
            else:
                self._full.run(template, config)
        return launched

    def verify(self, config: Config, cases: bool = True) -> str | None:
        if cases and (reason := self.verify_cases(config)) is not None:
            return reason
        return None if self._mode == "interpret" else self._wrong_at_length(config)

    def verify_cases(self, config: Config) -> str | None:
        _ = self._shared_cases  # as they are before the candidate runs
        tolerance = TOLERANCE[self._small.dtype]
        for case in self._cases:
            got = _watched(partial(case.pipeline.outputs, self._spec.template, config))
            reason = compare(got, case.want, tolerance, case.inputs.scores)
            if reason is not None:
                return f"{case.name} scores, n={self._small.n}: {reason}"
        return None

    def _wrong_at_length(self, config: Config) -> str | None:
        template, tolerance = self._spec.template, TOLERANCE[self._small.dtype]
        got = self._at_length(partial(self._full.run, template, config))
        if config == self._spec.companions[template] and (reason := self._sampled(got)) is not None:
            return f"n={self._spec.problem.n}, a sample: {reason}"
        # Both are rounded, each for itself.
        reason = compare(got, self._baseline, 2**0.5 * tolerance, self._full_inputs.scores)
        return f"n={self._spec.problem.n}, against the default config: {reason}" if reason else None

    def _sampled(self, got: Mapping[str, Tensor]) -> str | None:
        """Why the default's results at the timed length, which all others are compared with, are wrong; None where they
        are right, or memory is too scarce to tell."""
        p, found = self._full, None
        if "dk" in got:
            out, lse = (got[name] if name in got else getattr(p, name) for name in ("out", "lse"))
            found = SimpleNamespace(out=out, lse=lse, tau=p.selection.tau, expiry=p.selection.expiry)
        with contextlib.suppress(torch.OutOfMemoryError):
            return sample.difference(self._full_inputs, found, got, TOLERANCE[self._spec.problem.dtype])

    def check(self) -> None:
        for name in ("_shared_cases", "_shared_length"):
            if name in self.__dict__:
                getattr(self, name).check()

    def sampler(self, config: Config) -> Sample:
        return self._time(partial(self._full.run, self._spec.template, config))

    @cached_property
    def _time(self) -> CudaSampler:
        return CudaSampler(self._spec.device.l2)

    def _at_length(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The results of ``run`` at the timed length; between redzones, which keep every buffer, if memory allows."""
        try:
            return _watched(run)
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        return _watched(run, 0)

    @cached_property
    def _full_inputs(self) -> Inputs:
        return make_inputs(self._spec.problem, self._on)

    @cached_property
    def _full(self) -> Pipeline:
        return Pipeline(self._full_inputs, self._spec.companions)

    @cached_property
    def _meta_small(self) -> Pipeline:
        return Pipeline(make_inputs(self._small, self._on), self._small_companions)

    @cached_property
    def _small_companions(self) -> dict[str, Config]:
        """The defaults, whatever won: what a candidate is judged by depends on it alone, and is compiled once. With the
        shortest segments, so that a small problem has several: most of a list's parts need that."""
        defaults = {name: t.default(self._spec.problem, self._spec.device) for name, t in TEMPLATES.items()}
        return {**defaults, "schedule": Config({**defaults["schedule"], "SEGMENT": 256, "BLOCK": 256})}

    @cached_property
    def _baseline(self) -> dict[str, Tensor]:
        """What the default config, itself verified on the small cases, gives at the timed shape."""

        def run() -> dict[str, Tensor]:  # the inputs too are made here, between redzones
            self._full.prepare(self._spec.template)
            return self._full.run(self._spec.template, self._spec.companions[self._spec.template])

        return self._at_length(run)

    @cached_property
    def _shared_cases(self) -> Fingerprint:
        """Of all that candidates read and are judged by on the small problems."""
        return Fingerprint([
            (f"{name} ({case.name} scores, n={self._small.n})", t)
            for case in self._cases
            for name, t in [*case.pipeline.tensors(), *case.want.items()]
        ])  # fmt: skip

    @cached_property
    def _shared_length(self) -> Fingerprint:
        """The same at the timed length."""
        return Fingerprint([*_tensors("", self._baseline), *self._full.tensors()])

    @cached_property
    def _cases(self) -> list[_Case]:
        return [self._case(kind, seed) for seed, kind in enumerate(SCORES[self._mode])]

    def _case(self, kind: str, seed: int) -> _Case:
        inputs, want = _solved(self._small, self._on, kind, seed)
        # Upstream results come from the reference: a candidate is judged by its own kernels alone.
        with redzones() as zones:
            types = {"tau": torch.float32}
            selection = Selection(*(_placed(want[f], types.get(f, torch.int32)) for f in Selection._fields))
            out, lse = _placed(want["out"], inputs.query.dtype), _placed(want["lse"], torch.float32)
            pipeline = Pipeline(inputs, self._small_companions, {"selection": selection, "out": out, "lse": lse})
            pipeline.prepare(self._spec.template)
        zones.check(dict(pipeline.tensors()))
        return _Case(kind, inputs, pipeline, want)


@lru_cache(maxsize=max(map(len, SCORES.values())))
def _solved(problem: Problem, device: str, scores: str, seed: int) -> tuple[Inputs, dict[str, Tensor]]:
    """A small problem and its answer, for all templates at it. No other is kept: all are fingerprinted."""
    with redzones():
        inputs = make_inputs(problem, device, scores, seed)
    return inputs, expected(inputs)


def _watched(run: Callable[[], dict[str, Tensor]], size: int = SIZE) -> dict[str, Tensor]:
    """The results of ``run``, from poisoned buffers. Raises MemoryCorrupted."""
    with redzones(size) as zones:
        results = run()
    zones.check(results)
    return results


def preload() -> None:
    """Import what only the first use imports, and hash Triton itself and the kernels, before workers are forked."""
    launcher.hash_kernels()
    torch.empty_like(torch.empty(1, device="meta"))
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()


def warm_up(mode: str) -> None:
    """Set up what takes seconds on a GPU, while candidates are still being compiled: its context, torch's kernels that
    give and compare reference results, Triton's driver (which gcc compiles the first time)."""
    if mode == "measure" and torch.cuda.is_available():
        from triton.runtime import driver

        inputs = make_inputs(Problem("bf16", 16, 1, "kv", 8, 8, 32, 1), "cuda")
        want = expected(inputs)
        compare(want, want, TOLERANCE["bf16"], inputs.scores)
        Fingerprint(want.items()).check()
        driver.active.get_current_target()


def make(spec: Spec, mode: str) -> Stage:
    """The stage of ``spec``; mode as in :class:`KernelStage`."""
    return KernelStage(spec, mode)
