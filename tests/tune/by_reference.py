"""The real stage on the CPU, with the reference in place of the kernels: right results in the buffers that launch
functions make, and then what ``damage`` has. A config says which: Config(tile=..., fault=NAME), "late NAME" for the
timed length alone, "small NAME" for the small problems alone.

``make`` is a stage factory: the worker processes do all that those of a GPU do, but for the kernels and the timing.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import NamedTuple

import damage
import faults
import torch
from damage import Call

from sparsek_tune import launch, reference
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Problem
from sparsek_tune.reference import Selection
from sparsek_tune.tune import stages
from sparsek_tune.tune.types import Spec

FACTORY = "by_reference:make"
PROBLEM = Problem.of("bf16", 16, 2, "kv", 24, 16, 512, 2)  # verified at 461, too
NAMES = ("threshold", "schedule", "forward", "dq", "dkv")
GOOD = Config(tile=32, fault="none", SEGMENT=256, BLOCK=256)
DAMAGES = {**damage.WRONG, **damage.MEMORY, **damage.TOLERATED}


def spec(template, problem=PROBLEM):
    return Spec(template, problem, faults.DEVICE, dict.fromkeys(NAMES, GOOD))


class Lists(NamedTuple):
    """In place of a schedule: what the stages after it do not get otherwise."""

    first: torch.Tensor
    second: torch.Tensor
    scores: torch.Tensor
    k: int


def _new(like, **values):
    """New buffers, as launch functions make them, with ``values``: in the dtype of ``like`` where they have a D."""
    types = {n: like.dtype if x.dim() == 4 else torch.float32 if x.is_floating_point() else torch.int32
             for n, x in values.items()}  # fmt: skip
    return {n: like.new_empty(x.shape, dtype=types[n]).copy_(x) for n, x in values.items()}


def _done(config, results, call):
    name = config["fault"].removeprefix("late ").removeprefix("small ")
    where = config["fault"].removesuffix(name).strip()
    if name in DAMAGES and where in ("", "late" if call.scores.shape[-1] == PROBLEM.n else "small"):
        DAMAGES[name][1](results, call)
    return results


def threshold(scores, k, window, config):
    found = reference.select(scores.double(), k, window)
    return Selection(**_done(config, _new(scores, **found._asdict()), Call(scores=scores, k=k, window=window)))


def schedule(scores, selection, k, window, config):
    first, second = launch._carve(selection.expiry, torch.int32, 1000, 1000)
    _done(config, {"first": first.zero_(), "second": second.zero_()}, Call(scores=scores))
    return Lists(first, second, scores, k)


def forward(query, key, value, selection, lists, window, scale, gate, config):
    call = Call(
        query=query, key=key, value=value, scores=lists.scores, k=lists.k, window=window, scale=scale, gate=gate
    )
    out, lse, *_ = call.forward()
    results = _done(config, _new(query, out=out, lse=lse), call)
    return results["out"], results["lse"]


def dq(dout, query, key, value, scores, out, lse, selection, lists, window, scale, gate, config):
    call = Call(dout=dout, query=query, key=key, value=value, scores=scores, k=lists.k, window=window, scale=scale,
                gate=gate)  # fmt: skip
    delta, gbar = (dout.double() * out.double()).sum(-1), torch.zeros_like(scores)
    results = _done(config, _new(query, dq=call.backward()["dq"], delta=delta, gbar=gbar), call)
    return results["dq"], results["delta"], results["gbar"]


def dkv(dout, query, key, value, scores, lse, delta, gbar, selection, lists, window, scale, gate, config):
    call = Call(dout=dout, query=query, key=key, value=value, scores=scores, k=lists.k, window=window, scale=scale,
                gate=gate, selection=selection)  # fmt: skip
    grads = call.backward()
    results = _done(config, _new(key, **{n: grads[n] for n in ("dk", "dv", "du")}), call)
    return results["dk"], results["dv"], results["du"]


class Stage(stages.KernelStage):
    """With times that follow from the config, and a fault that the timed runs alone have."""

    def __init__(self, spec, mode):
        super().__init__(spec._replace(companions=dict.fromkeys(NAMES, GOOD) | spec.companions), mode)

    def sampler(self, config):
        if config["fault"] == "changes an input when timed":
            self._full_inputs.key[0, 0, 0, 0] += 1
        ms, rng = faults.true_ms(config), random.Random(config.key)
        return lambda count: [ms * (1 + 0.01 * rng.random()) for _ in range(count)]


def install(set_attribute=setattr):
    """Put the stand-ins in the place of the launch functions."""
    for function in (threshold, schedule, forward, dq, dkv):
        set_attribute(launch, function.__name__, function)
    set_attribute(stages, "_TORCH_DEVICE", {"measure": "cpu"})
    set_attribute(stages, "TEMPLATES", dict.fromkeys(NAMES, SimpleNamespace(default=lambda problem, device: GOOD)))


def make(spec, mode):
    if mode == "compile":
        return faults.Stage(spec, mode)
    install()
    torch.set_num_threads(1)
    return Stage(spec, mode)
