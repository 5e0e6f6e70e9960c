"""Are the results right that are about to be timed? Nothing is timed that has not passed.

At a reduced length everything is compared with the float64 reference. At the timed length, where that would take hours,
a sample is: queries (out, lse, dq), each from its own prefix of the scores by the definition, and keys (dk, dv), each
over all queries that see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsek_tune import dispatch, reference
from sparsek_tune.bench import ours
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Problem
from sparsek_tune.tune.stages import Inputs, make_inputs
from sparsek_tune.tune.verify import TOLERANCE, compare, expected, reduced, relative_error

QUERIES, KEYS = 20, 4  # sampled: queries of all heads; keys of every KV head
ROUNDED = 2.0  # a dq may be so many times as far off as one in exact arithmetic whose out, weights and ds are rounded


class Verdict(NamedTuple):
    """errors: relative errors by name; reason: why the check failed, None if it passed; tolerance: the most allowed."""

    errors: dict[str, float]
    reason: str | None
    tolerance: float

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.reason is None, "reason": self.reason, "tolerance": self.tolerance, **self.errors}


def at_reduced_length(problem: Problem, configs: Mapping[str, Config], device: str, seed: int) -> Verdict:
    """The public operator with ``configs`` at a small problem of the same kind, against the reference in float64."""
    small = reduced(problem)
    i = make_inputs(small, device, "normal", seed)
    want = expected(i)
    with dispatch.override(configs):
        got: dict[str, Tensor] = dict(zip(("out", "lse", "tau", "expiry"), ours.results(i), strict=True))
        names = [f"d{x}" for x, t in zip("qkvu", ours.leaves(i), strict=True) if t.requires_grad]
        got.update(zip(names, ours.forward_backward(i)(), strict=True))
    tolerance = TOLERANCE[small.dtype]
    errors = {name: relative_error(got[name].double(), want[name].double()) for name in ("out", "lse", *names)}
    return Verdict(errors, compare(got, want, tolerance, i.scores), tolerance)


def at_length(i: Inputs, dtype: str, seed: int, backward: bool = True) -> Verdict:
    """The public operator on the very inputs that are timed, against samples in float64."""
    found, grads = ours.results(i), ours.forward_backward(i)() if backward else None
    at = sample_queries(i.scores.shape[-1], seed)
    want = expected_queries(i, at)
    got = {"out": found.out[:, :, at], "lse": found.lse[:, :, at]}
    if grads:
        keys = sample_keys(found.expiry, seed)
        want.update(expected_keys(i, found, keys))
        got.update(dq=grads[0][:, :, at], dk=_at(grads[1], keys), dv=_at(grads[2], keys))
    errors = {name: relative_error(x.double(), want[name]) for name, x in got.items()}
    allowed = dict.fromkeys(got, TOLERANCE[dtype])
    if grads:
        # Where few keys have most of the weight, dq is a small difference of do * v and do * out, and out is stored in
        # the inputs' dtype: no implementation that does so comes closer.
        inherent = relative_error(want["dq_rounded"], want["dq"])
        allowed["dq"] = max(allowed["dq"], ROUNDED * inherent)
    bad = [f"{name}: relative error {e:.2e}, at most {allowed[name]:.0e} allowed" for name, e in errors.items()
           if not e <= allowed[name]]  # fmt: skip
    return Verdict(errors, "; ".join(bad) or None, max(allowed.values()))


def sample_queries(n: int, seed: int, count: int = QUERIES) -> Tensor:
    """Positions of queries: the first, the last and random ones; sorted, distinct (int64)."""
    some = torch.randint(n, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([some, torch.tensor([0, n - 1])]).unique()


def sample_keys(expiry: Tensor, seed: int) -> Tensor:
    """Positions [B, Hkv, KEYS] of keys, drawn in proportion to how many queries see them.

    expiry: [B, Hkv, N] (every key is seen by the queries from its own position to its expiry, window included).
    """
    rows = expiry.flatten(0, 1).cpu()
    seen = (rows - torch.arange(rows.shape[1])).clamp_min(0).double().cumsum(1)
    draw = torch.rand((len(rows), KEYS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at = torch.searchsorted(seen, draw * seen[:, -1:], right=True).clamp_max(rows.shape[1] - 1)
    return at.view(*expiry.shape[:2], KEYS).to(expiry.device)


def _at(t: Tensor, index: Tensor) -> Tensor:
    """t [B, H, N, D] at positions [B, H, S]."""
    return t.gather(2, index[..., None].expand(*index.shape, t.shape[-1]))


def expected_queries(i: Inputs, at: Tensor) -> dict[str, Tensor]:
    """out, dq and dq_rounded [B, Hq, len(at), D], lse [B, Hq, len(at)], in float64, by the definition.

    dq_rounded is dq with out, weights and ds rounded to the inputs' dtype, as the kernels hold them.
    """
    parts = [_query(i, t) for t in at.tolist()]
    return {name: torch.stack([p[name] for p in parts], dim=2) for name in parts[0]}


def selected(i: Inputs, t: int) -> tuple[Tensor, Tensor]:
    """The keys that query ``t`` selects, and their gates (float64): [B, Hkv, min(k, candidates)], by sorting all."""
    prefix = i.scores[..., : max(t - i.window + 1, 0)].double() + 0.0
    if prefix.shape[-1] <= i.k:
        index = torch.arange(prefix.shape[-1], device=prefix.device).expand(prefix.shape)
        return index, torch.ones_like(prefix)
    index = prefix.sort(dim=-1, descending=True, stable=True).indices[..., : i.k]
    return index, reference.sparsek(prefix, i.k).gather(-1, index)


def _query(i: Inputs, t: int) -> dict[str, Tensor]:
    index, m = selected(i, t)
    window = torch.arange(max(t - i.window + 1, 0), t + 1, device=index.device) if i.window else index.new_empty(0)
    index = torch.cat([index, window.expand(*index.shape[:2], -1)], dim=-1)
    m = torch.cat([m, m.new_ones(*m.shape[:2], len(window))], dim=-1)
    gk, gv = (m[:, :, None] if gate in used else 1.0 for gate, used in ((i.gate, ("kv",)), (i.gate, ("kv", "v"))))
    group = (i.key.shape[1], -1)
    q, do = (x[:, :, t].double().unflatten(1, group) for x in (i.query, i.dout))  # [B, Hkv, G, D]
    k, v = (_at(x, index).double() for x in (i.key, i.value))
    logits = i.scale * (q @ k.mT) * gk
    lse = logits.logsumexp(-1)
    p = (logits - lse[..., None]).exp()
    out = (p * gv) @ v

    def dq(round_: Callable[[Tensor], Tensor]) -> Tensor:
        o = round_(round_(p * gv) @ v)
        ds = p * (gv * (do @ v.mT) - (do * o).sum(-1, keepdim=True))
        return (i.scale * round_(ds * gk) @ k).flatten(1, 2)

    rounded = dq(lambda t: t.to(i.query.dtype).double())
    exact = dq(lambda t: t)
    return {"out": out.flatten(1, 2), "lse": lse.flatten(1, 2), "dq": exact, "dq_rounded": rounded}


def expected_keys(i: Inputs, found: ours.Results, at: Tensor) -> dict[str, Tensor]:
    """dk and dv [B, Hkv, S, D] in float64 at the keys ``at`` [B, Hkv, S].

    From lse, out, tau and expiry as they were found: the sample of queries vouches for those.
    """
    shape = (*at.shape, i.key.shape[-1])
    dk, dv = (torch.zeros(shape, dtype=torch.float64, device=at.device) for _ in range(2))
    group = i.query.shape[1] // i.key.shape[1]
    for b, h, s in torch.cartesian_prod(*map(torch.arange, at.shape)).tolist():
        j = int(at[b, h, s])
        end = int(found.expiry[b, h, j])
        m = _gates(i, found, b, h, j, end)
        for head in range(h * group, (h + 1) * group):
            x, y = _key(i, found, b, h, head, j, end, m)
            dk[b, h, s] += x
            dv[b, h, s] += y
    return {"dk": dk, "dv": dv}


def _gates(i: Inputs, found: ours.Results, b: int, h: int, j: int, end: int) -> Tensor:
    """m of key ``j`` for the queries j to end, 1 while it is in the window."""
    u = i.scores[b, h, j].double()
    m = (u - found.tau[b, h, j:end].double()).clamp(0, 1)
    m[: i.window] = 1
    return m


def _key(
    i: Inputs, found: ours.Results, b: int, h: int, head: int, j: int, end: int, m: Tensor
) -> tuple[Tensor, Tensor]:
    """What one query head adds to dk and dv of key ``j``."""
    seen = slice(j, end)
    q, do, out = (x[b, head, seen].double() for x in (i.query, i.dout, found.out))
    gk, gv = m if i.gate == "kv" else 1.0, m if i.gate != "none" else 1.0
    p = (i.scale * gk * (q @ i.key[b, h, j].double()) - found.lse[b, head, seen].double()).exp()
    ds = p * (gv * (do @ i.value[b, h, j].double()) - (do * out).sum(-1))
    return (i.scale * gk * ds) @ q, (p * gv) @ do
