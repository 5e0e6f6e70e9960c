"""Host side of every stage: buffers, grids and kernel launches, each from one config.

Every buffer's size follows from shapes, nothing is read back from the device, so forward and backward can be captured
in a CUDA graph. Arguments are taken as valid: ``ops`` checks them. Query, key, value and the output gradient may have
any strides as long as the last dimension is contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernel_templates import dkv as dkv_t
from .kernel_templates import dq as dq_t
from .kernel_templates import forward as forward_t
from .kernel_templates import schedule as schedule_t
from .kernel_templates import threshold as threshold_t
from .kernel_templates.base import Config, next_pow2
from .kernel_templates.tiles import GATES
from .reference import Selection

_compiled: list[Any] | None = None
_dry = False


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Within the block stages make their output tensors and neither compile nor launch a kernel."""
    global _dry
    before, _dry = _dry, True
    try:
        yield
    finally:
        _dry = before


@contextlib.contextmanager
def compile_only() -> Iterator[list[Any]]:
    """Within the block stages compile their kernels for the active Triton target and launch none: for tensors on the
    meta device. Yields the list that the compiled kernels are appended to."""
    global _compiled
    before, _compiled = _compiled, []
    try:
        yield _compiled
    finally:
        _compiled = before


def _cdiv(n: int, size: int) -> int:
    return -(-n // size)


def _run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    if _dry:
        return
    if _compiled is not None:
        _compiled.append(kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **meta))
    else:
        kernel[grid](*args, enable_fp_fusion=True, **meta)


class Schedule(NamedTuple):
    """Per segment of queries, the keys they read (``kernel_templates.schedule``).

    keys, and of each its score (float32), expiry and sat_end: int32 [rows, segments, cap]; bounds: int32
    [rows, segments, 4]; start, stop: int32 [rows, N].
    """

    keys: Tensor
    scores: Tensor
    expiry: Tensor
    sat_end: Tensor
    bounds: Tensor
    start: Tensor
    stop: Tensor
    segment: int


def threshold(scores: Tensor, k: int, window: int, config: Config) -> Selection:
    """Selection of scores [B, Hkv, N] (float32, contiguous)."""
    b, h, n = scores.shape
    rows, m = b * h, n - window
    expiry, sat_end, sup_end = (scores.new_full((b, h, n), n, dtype=torch.int32) for _ in range(3))
    tau = scores.new_full((b, h, n), float("-inf"))
    interior = scores.new_zeros((b, h, n), dtype=torch.int32)
    if m <= k:
        return Selection(tau, expiry, sat_end, sup_end, interior)
    # Adding zero makes -0.0 and 0.0 one value for the sort too.
    us, order = torch.sort(scores.reshape(rows, n)[:, :m] + 0.0, dim=1, descending=True, stable=True)
    events = scores.new_empty((rows, 2 * m), dtype=torch.int64)
    codes = scores.new_empty((rows, 2 * m), dtype=torch.int32)
    rank_codes = scores.new_empty((rows, m), dtype=torch.int32)
    values = scores.new_empty((rows, m), dtype=torch.int64)
    keys = scores.new_empty((rows, 3, m), dtype=torch.int32)
    pointers = scores.new_empty((rows, 2, m), dtype=torch.int32)
    log = (2 * m).bit_length()
    _run(
        threshold_t.events_kernel, (_cdiv(m, 256), rows),
        us, order, events, codes, rank_codes, values, keys, m, LOG=log, BLOCK=256, num_warps=4,
    )  # fmt: skip
    coarse, span, blocks = threshold_t.cuts(m, config["COARSE"])
    chunks = _cdiv(m, coarse)
    table = scores.new_zeros((rows, 2, chunks, blocks, 2), dtype=torch.int64)
    _run(
        threshold_t.table_kernel, (blocks, 2, rows),
        events, codes, rank_codes, table, m, blocks, chunks, SPAN=span, COARSE=coarse, WINDOW=1024, num_warps=4,
    )  # fmt: skip
    state = scores.new_empty((rows, 2, chunks, 4), dtype=torch.int64)
    _run(
        threshold_t.start_kernel, (chunks, 2, rows),
        table, state, us, events, codes, rank_codes, blocks, m, k, LOG=log, BLOCKS=next_pow2(blocks), SPAN=span,
        COARSE=coarse, WINDOW=config["coarse_window"], num_warps=config["coarse_warps"],
    )  # fmt: skip
    for chunk, step, walk in ((coarse, config["FINE"], "coarse"), (config["FINE"], 1, "fine")):
        steps = _cdiv(m, step)
        out = scores.new_empty((rows, 2, steps, 4), dtype=torch.int64) if step > 1 else state
        _run(
            threshold_t.walk_kernel, (chunks, 2, rows),
            state, out, us, events, codes, rank_codes, keys, values, pointers, tau, interior, chunks, steps, m, n,
            window, k, LOG=log, CHUNK=chunk, STEP=step, WINDOW=config[f"{walk}_window"],
            num_warps=config[f"{walk}_warps"],
        )  # fmt: skip
        state, chunks = out, steps
    _run(
        threshold_t.intervals_kernel, (_cdiv(n, 256), rows),
        pointers, keys, expiry, sat_end, sup_end, m, n, window, LOG=log, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return Selection(tau, expiry, sat_end, sup_end, interior)


def schedule(scores: Tensor, selection: Selection, k: int, window: int, config: Config) -> Schedule | None:
    """The lists of keys per segment; None where no key is a candidate of any query (``window >= N``)."""
    expiry = selection.expiry
    n = expiry.shape[-1]
    rows, m = expiry.numel() // n, n - window
    if m <= 0:
        return None
    evicted = torch.full_like(expiry, -1)
    _run(schedule_t.evicted_kernel, (_cdiv(n, 256), rows), expiry, evicted, n, window, BLOCK=256, num_warps=4)
    segment, block, warps = config["SEGMENT"], config["BLOCK"], config["num_warps"]
    cap = min(k, m)
    alive, count, parents, parent_size = expiry, expiry, 1, 0
    for size in schedule_t.levels(segment, n):
        nodes = _cdiv(n, size)
        children = expiry.new_empty((rows, nodes, cap))
        counts = expiry.new_empty((rows, nodes))
        _run(
            schedule_t.alive_kernel, (nodes, rows),
            expiry, alive, count, children, counts, n, m, window, parents, cap, SIZE=size, PARENT_SIZE=parent_size,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
        alive, count, parents, parent_size = children, counts, nodes, size
    out = Schedule(
        expiry.new_zeros((rows, parents, cap + segment)),
        *[expiry] * 3,
        expiry.new_empty((rows, parents, 4)),
        expiry.new_empty((rows, n)),
        expiry.new_empty((rows, n)),
        segment,
    )
    _run(
        schedule_t.segments_kernel, (parents, rows),
        expiry, selection.sat_end, evicted, alive, count, out.keys, *out[4:7], n, m, window, cap, cap + segment, SEGMENT=segment,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    at = out.keys.view(rows, -1).clamp(0, n - 1).long()
    cols = [t.view(rows, n).gather(1, at).view(out.keys.shape) for t in (scores, expiry, selection.sat_end)]
    return out._replace(scores=cols[0], expiry=cols[1], sat_end=cols[2])


class _Shape(NamedTuple):
    """The constants that every attention kernel takes."""

    rows: int
    n: int
    kv_heads: int
    meta: dict[str, Any]


def _shape(query: Tensor, key: Tensor, gate: str, *others: Tensor) -> _Shape:
    b, hq, n, d = query.shape
    g = hq // key.shape[1]
    meta = {
        "G": g, "HEADS": next_pow2(g), "D": d, "BD": max(16, next_pow2(d)), "GATE": GATES[gate],
        "WIDE": any(_span(t) >= 1 << 31 for t in (query, key, *others)),
    }  # fmt: skip
    return _Shape(b * key.shape[1], n, key.shape[1], meta)


def _span(t: Tensor) -> int:
    """One past the largest element offset of a tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def _list_args(sched: Schedule | None, like: Tensor) -> tuple[list[Tensor], int, int, int]:
    """List pointers, number of segments, capacity and segment length; placeholders where there is no list."""
    if sched is None:
        return [like] * 7, 1, 1, 1 << 30
    return list(sched[:7]), sched.keys.shape[1], sched.keys.shape[2], sched.segment


def _tile(config: Config) -> dict[str, Any]:
    return {name: config[name] for name in ("BM", "BN", "num_warps", "num_stages")}


def _dense_rows(t: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def forward(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, selection: Selection, sched: Schedule | None,
    window: int, scale: float, gate: str, config: Config,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, Hq, N, D] in the query's dtype and lse [B, Hq, N] (natural logarithm, float32)."""
    query, key, value = map(_dense_rows, (query, key, value))
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    s = _shape(query, key, gate, value, out)
    lists, segments, cap, segment = _list_args(sched, selection.expiry)
    bq = config["BM"] // s.meta["HEADS"]
    _run(
        forward_t.forward_kernel, (_cdiv(s.n, bq), s.rows),
        query, key, value, selection.tau, *lists[:3], *lists[4:], out, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        s.n, window, scale, segments, cap, s.kv_heads, **s.meta, SELECTED=sched is not None, WINDOW=window > 0,
        SEGMENT=segment, STAGES=config["num_stages"], **_tile(config),
    )  # fmt: skip
    return out, lse


def dq(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, out: Tensor, lse: Tensor,
    selection: Selection, sched: Schedule | None, window: int, scale: float, gate: str, config: Config,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (as the query), delta = sum_d dout * out [B, Hq, N] and gbar [B, Hkv, N], both float32."""
    dout, query, key, value, out = map(_dense_rows, (dout, query, key, value, out))
    grad = query.new_empty(query.shape)
    delta = torch.empty_like(lse)
    gbar = scores.new_empty(scores.shape)
    s = _shape(query, key, gate, value, out, dout)
    lists, segments, cap, segment = _list_args(sched, selection.expiry)
    bq = config["BM"] // s.meta["HEADS"]
    _run(
        dq_t.dq_kernel, (_cdiv(s.n, bq), s.rows),
        dout, query, key, value, out, lse, selection.tau, selection.interior, *lists, grad, delta, gbar, *dout.stride()[:3], *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], *out.stride()[:3], *grad.stride()[:3], s.n, window, scale, segments, cap, s.kv_heads,
        **s.meta, SELECTED=sched is not None, WINDOW=window > 0, SEGMENT=segment, **_tile(config),
    )  # fmt: skip
    return grad, delta, gbar


def dkv(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, lse: Tensor, delta: Tensor, gbar: Tensor,
    selection: Selection, sched: Schedule | None, window: int, scale: float, gate: str, config: Config,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dk, dv (as key and value) and du [B, Hkv, N] float32."""
    dout, query, key, value = map(_dense_rows, (dout, query, key, value))
    dk, dv = key.new_empty(key.shape), value.new_empty(value.shape)
    du = scores.new_empty(scores.shape)
    s = _shape(query, key, gate, value, dout)
    lists, segments, cap, segment = _list_args(sched, selection.expiry)
    d, tile = s.meta["D"], _tile(config)
    strides = (*dout.stride()[:3], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    parts, band, prefix, chunks = (du,) * 3, (du,) * 2, (du,) * 2, _cdiv(s.n + 1, dkv_t.CHUNK)
    if sched is not None:
        entries = (s.rows * segments * cap, d)
        parts = (du.new_empty(entries), du.new_empty(entries), du.new_empty(entries[0]))
        _run(
            dkv_t.dkv_kernel, (_cdiv(cap, config["BN"]), segments, s.rows),
            dout, query, key, value, lse, delta, selection.tau, *lists[:5],
            *parts, *strides, s.n, window, scale, segments, cap, s.kv_heads, **s.meta, SEGMENT=segment, **tile,
        )  # fmt: skip
    if window > 0:
        band = (du.new_empty((s.rows, s.n, d)), du.new_empty((s.rows, s.n, d)))
        meta = {name: x for name, x in s.meta.items() if name != "GATE"}
        _run(
            dkv_t.band_kernel, (_cdiv(s.n, config["BN"]), s.rows),
            dout, query, key, value, lse, delta, *band, *strides, s.n, window, scale, s.kv_heads, **meta, **tile,
        )  # fmt: skip
    if sched is not None and gate != "none":
        prefix = tuple(du.new_empty((s.rows, size), dtype=torch.float64) for size in (s.n + 1, chunks))
        _run(dkv_t.prefix_kernel, (chunks, s.rows), gbar, *prefix, s.n, chunks, BLOCK=dkv_t.CHUNK, num_warps=4)
        _run(dkv_t.offsets_kernel, (s.rows,), prefix[1], chunks, BLOCK=1024, num_warps=4)
    meta = {name: s.meta[name] for name in ("D", "BD", "GATE", "WIDE")}
    _run(
        dkv_t.reduce_kernel, (_cdiv(s.n, config["BLOCK"]), s.rows),
        *parts, *band, *prefix, selection.expiry, selection.sat_end, selection.sup_end, lists[0], *lists[4:], dk, dv, du,
        *dk.stride()[:3], *dv.stride()[:3], s.n, s.n - window, window, segments, chunks, cap, s.kv_heads, **meta,
        SELECTED=sched is not None, WINDOW=window > 0, SEGMENT=segment, PREFIX=dkv_t.CHUNK, BLOCK=config["BLOCK"],
        STEPS=cap.bit_length(), num_warps=config["reduce_warps"],
    )  # fmt: skip
    return dk, dv, du


def attention(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, k: int, window: int, scale: float, gate: str,
    configs: Mapping[str, Config],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output, lse and the five tensors of the selection."""
    scores = scores.contiguous()
    selection = threshold(scores, k, window, configs["threshold"])
    sched = schedule(scores, selection, k, window, configs["schedule"])
    out, lse = forward(query, key, value, scores, selection, sched, window, scale, gate, configs["forward"])
    return out, lse, *selection


def attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, out: Tensor, lse: Tensor,
    selection: Selection, k: int, window: int, scale: float, gate: str, configs: Mapping[str, Config],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and scores. The schedule is built anew: it is cheaper than saving it, and no saved
    shape depends on a config."""
    scores = scores.contiguous()
    sched = schedule(scores, selection, k, window, configs["schedule"])
    args = (window, scale, gate)
    grad, delta, gbar = dq(dout, query, key, value, scores, out, lse, selection, sched, *args, configs["dq"])
    rest = dkv(dout, query, key, value, scores, lse, delta, gbar, selection, sched, *args, configs["dkv"])
    return grad, *rest
