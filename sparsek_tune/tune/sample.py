"""Samples of results at lengths where the whole reference would take hours, in float64.

Queries (out, lse, dq), each from its own prefix of the scores by the definition, and keys (dk, dv), each over all
queries that see it. ``i`` is a ``stages.Inputs`` throughout; ``found`` has results of the kernels that keys are sampled
by, for which the queries vouch: out [B, Hq, N, D], lse [B, Hq, N], tau and expiry [B, Hkv, N].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsek_tune import reference
from sparsek_tune.tune.verify import allowed, relative_error

QUERIES, KEYS = 20, 4  # sampled: queries of all heads; keys of a KV head
HEADS = 256  # KV heads whose keys are sampled, at most: each key is worked out by itself
ROUNDED = 2.0  # a dq may be so many times as far off as one in exact arithmetic whose out, weights and ds are rounded
_NEAR = 1e-4  # of scores: how far off a threshold may be


def difference(i: Any, found: Any, results: Mapping[str, Tensor], tolerance: float, seed: int = 0) -> str | None:
    """Why ``results`` (those of out, lse, dq, dk, dv, tau and expiry that there are) are wrong in a sample, or None."""
    if "tau" in results:
        at = sample_queries(i.scores.shape[-1], seed)
        if (reason := _selects_else(i, results["tau"], results["expiry"], at)) is not None:
            return reason
    for name, (error, inherent) in errors(i, found, results, seed).items():
        if not error <= (most := max(allowed(name, tolerance), inherent)):
            return too_far(name, error, most)
    return None


def errors(i: Any, found: Any, results: Mapping[str, Tensor], seed: int) -> dict[str, tuple[float, float]]:
    """By the name of a result (those of out, lse, dq, dk and dv that there are) its relative error in a sample, and the
    one that nothing that stores what the kernels do could stay below."""
    at = sample_queries(i.scores.shape[-1], seed)
    got = {name: results[name][:, :, at] for name in ("out", "lse", "dq") if name in results}
    want = expected_queries(i, at) if got else {}
    # Where few keys have most of the weight, dq is a small difference of do * v and do * out, and out is stored in the
    # inputs' dtype: no implementation that does so comes closer.
    inherent = {"dq": ROUNDED * relative_error(want["dq_rounded"], want["dq"])} if "dq" in got else {}
    if "dk" in results:
        keys = sample_keys(found.expiry, seed)
        want |= expected_keys(i, found, keys)
        got |= {name: results[name][keys] for name in ("dk", "dv")}
    return {name: (relative_error(x.double(), want[name]), inherent.get(name, 0.0)) for name, x in got.items()}


def too_far(name: str, error: float, most: float) -> str:
    return f"{name}: relative error {error:.2e}, at most {most:.0e} allowed"


def _selects_else(i: Any, tau: Tensor, expiry: Tensor, at: Tensor) -> str | None:
    """Whether a query of the sample selects other keys, or with other gates, than the definition says."""
    position = torch.arange(expiry.shape[-1], device=expiry.device)
    for t in at.tolist():
        index, gates = selected(i, t)
        chosen = (position + i.window <= t) & (t < expiry)
        if not torch.equal(chosen, torch.zeros_like(chosen).scatter(-1, index, torch.ones_like(chosen))):
            return f"expiry: query {t} selects other keys"
        u = i.scores.double().gather(-1, index)
        m = (u - tau[..., t, None].double()).clamp(0, 1)
        if not bool(((m - gates).abs() <= _NEAR * (1 + u.abs())).all()):
            return f"tau: query {t} has other gates"
    return None


def sample_queries(n: int, seed: int, count: int = QUERIES) -> Tensor:
    """Positions of queries: the first, the last and random ones; sorted, distinct (int64)."""
    some = torch.randint(n, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([some, torch.tensor([0, n - 1])]).unique()


def sample_keys(expiry: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """KEYS keys of every KV head, or of HEADS random ones, drawn in proportion to how many queries see them.

    expiry: [B, Hkv, N] (every key is seen by the queries from its own position to its expiry, window included). Returns
    batch, head and position of each, as they index a tensor: [S], int64, on expiry's device.
    """
    (batches, heads, n), generator = expiry.shape, torch.Generator().manual_seed(seed)
    rows = torch.randperm(batches * heads, generator=generator)[:HEADS]
    b, h = rows // heads, rows % heads
    seen = (expiry[b, h].cpu() - torch.arange(n)).clamp_min(0).double().cumsum(1)
    draw = torch.rand((len(rows), KEYS), generator=generator, dtype=torch.float64)
    j = torch.searchsorted(seen, draw * seen[:, -1:], right=True).clamp_max(n - 1).flatten()
    b, h, j = (t.to(expiry.device) for t in (b.repeat_interleave(KEYS), h.repeat_interleave(KEYS), j))
    return b, h, j


def at_positions(t: Tensor, index: Tensor) -> Tensor:
    """t [B, H, N, D] at positions [B, H, S]."""
    return t.gather(2, index[..., None].expand(*index.shape, t.shape[-1]))


def expected_queries(i: Any, at: Tensor) -> dict[str, Tensor]:
    """out, dq and dq_rounded [B, Hq, len(at), D], lse [B, Hq, len(at)], in float64, by the definition.

    dq_rounded is dq with out, weights and ds rounded to the inputs' dtype, as the kernels hold them.
    """
    parts = [_query(i, t) for t in at.tolist()]
    return {name: torch.stack([p[name] for p in parts], dim=2) for name in parts[0]}


def selected(i: Any, t: int) -> tuple[Tensor, Tensor]:
    """The keys that query ``t`` selects, and their gates (float64): [B, Hkv, min(k, candidates)], by sorting all."""
    prefix = i.scores[..., : max(t - i.window + 1, 0)].double() + 0.0
    if prefix.shape[-1] <= i.k:
        index = torch.arange(prefix.shape[-1], device=prefix.device).expand(prefix.shape)
        return index, torch.ones_like(prefix)
    index = prefix.sort(dim=-1, descending=True, stable=True).indices[..., : i.k]
    return index, reference.sparsek(prefix, i.k).gather(-1, index)


def _query(i: Any, t: int) -> dict[str, Tensor]:
    index, m = selected(i, t)
    window = torch.arange(max(t - i.window + 1, 0), t + 1, device=index.device) if i.window else index.new_empty(0)
    index = torch.cat([index, window.expand(*index.shape[:2], -1)], dim=-1)
    m = torch.cat([m, m.new_ones(*m.shape[:2], len(window))], dim=-1)
    gk, gv = (m[:, :, None] if gate in used else 1.0 for gate, used in ((i.gate, ("kv",)), (i.gate, ("kv", "v"))))
    group = (i.key.shape[1], -1)
    q, do = (x[:, :, t].double().unflatten(1, group) for x in (i.query, i.dout))  # [B, Hkv, G, D]
    k, v = (at_positions(x, index).double() for x in (i.key, i.value))
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


def expected_keys(i: Any, found: Any, keys: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """dk and dv [S, D] in float64 at ``keys``, as :func:`sample_keys` gives them.

    From lse, out, tau and expiry as they were found: the sample of queries vouches for those.
    """
    group = i.query.shape[1] // i.key.shape[1]
    results = []
    for b, h, j, end in torch.stack([*keys, found.expiry[keys].long()], dim=1).tolist():
        m = _gates(i, found, b, h, j, end)
        results.append(sum(_key(i, found, b, h, head, j, end, m) for head in range(h * group, (h + 1) * group)))
    dk, dv = torch.stack(results, dim=1)
    return {"dk": dk, "dv": dv}


def _gates(i: Any, found: Any, b: int, h: int, j: int, end: int) -> Tensor:
    """m of key ``j`` for the queries j to end, 1 while it is in the window."""
    u = i.scores[b, h, j].double()
    m = (u - found.tau[b, h, j:end].double()).clamp(0, 1)
    m[: i.window] = 1
    return m


def _key(i: Any, found: Any, b: int, h: int, head: int, j: int, end: int, m: Tensor) -> Tensor:
    """What one query head adds to dk and dv of key ``j``: [2, D]."""
    seen = slice(j, end)
    q, do, out = (x[b, head, seen].double() for x in (i.query, i.dout, found.out))
    gk, gv = m if i.gate == "kv" else 1.0, m if i.gate != "none" else 1.0
    p = (i.scale * gk * (q @ i.key[b, h, j].double()) - found.lse[b, head, seen].double()).exp()
    ds = p * (gv * (do @ i.value[b, h, j].double()) - (do * out).sum(-1))
    return torch.stack([(i.scale * gk * ds) @ q, (p * gv) @ do])
