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

from . import launcher
from .kernel_templates import crossing
from .kernel_templates import dkv as dkv_t
from .kernel_templates import dq as dq_t
from .kernel_templates import events as events_t
from .kernel_templates import filter as filter_t
from .kernel_templates import forward as forward_t
from .kernel_templates import schedule as schedule_t
from .kernel_templates import sort as sort_t
from .kernel_templates import threshold as threshold_t
from .kernel_templates import walk as walk_t
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


def _carve(like: Tensor, dtype: torch.dtype, *sizes: int) -> list[Tensor]:
    """Flat buffers of these sizes out of one allocation, each at a multiple of 256 bytes or more."""
    padded = [-(-size // 64) * 64 for size in sizes]
    return list(like.new_empty(sum(padded), dtype=dtype).split(padded))


def _run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    if _dry:
        return
    if _compiled is not None:
        launcher.hash_kernels()
        _compiled.append(kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **meta))
    else:
        launcher.launch(kernel, grid, args, meta)


class Schedule(NamedTuple):
    """Per segment of queries, the keys they read (``kernel_templates.schedule``).

    keys, and of each its score (float32), expiry and sat_end: int32 [rows, segments, cap]; bounds: int32
    [rows, segments, 5]; start, stop, late_stop: int32 [rows, N].
    """

    keys: Tensor
    scores: Tensor
    expiry: Tensor
    sat_end: Tensor
    bounds: Tensor
    start: Tensor
    stop: Tensor
    late_stop: Tensor
    segment: int


def threshold(scores: Tensor, k: int, window: int, config: Config) -> Selection:
    """Selection of scores [B, Hkv, N] (float32, contiguous)."""
    n = scores.shape[2]
    rows, m = scores.shape[0] * scores.shape[1], n - window
    expiry, sat_end, sup_end, interior = (scores.new_empty(scores.shape, dtype=torch.int32) for _ in range(4))
    tau = scores.new_empty(scores.shape)
    results = Selection(tau, expiry, sat_end, sup_end, interior)
    if m <= k:
        _run(sort_t.prepare_kernel, (_cdiv(n, 1024), rows), *results, n, BLOCK=1024, num_warps=4)
    elif threshold_t.filtered(m, k):
        _filtered_threshold(scores, results, rows, n, m, k, window, config)
    else:
        _threshold(scores, None, results, rows, n, m, k, window, config)
    return results


def _filtered_threshold(
    scores: Tensor, results: Selection, rows: int, n: int, m: int, k: int, window: int, config: Config
) -> None:
    """The threshold of the keys that the filter leaves, as rows of their own with room for all, and back."""
    bounds, block = threshold_t.bounds(m, k), threshold_t.BLOCK
    blocks = _cdiv(m, block)
    stride, recent = threshold_t.recent(m, k)
    total = bounds * filter_t.PARTS.value + recent
    left, tau, lowest = _carve(scores, torch.float32, rows * m, rows * m, rows * total)
    key, index, expiry, sat_end, sup_end, interior, counts, count = _carve(
        scores, torch.int32, *6 * [rows * m], rows * blocks, rows
    )
    _run(
        filter_t.bounds_kernel, (total, rows),
        scores, lowest, n, k, bounds, stride, BLOCK=threshold_t.BOUNDED, num_warps=4,
    )  # fmt: skip
    rest = (n, m, k, bounds, stride, total)
    _run(filter_t.count_kernel, (blocks, rows), scores, lowest, counts, *rest, BLOCK=block, num_warps=4)
    _run(
        filter_t.compact_kernel, (blocks, rows),
        scores, lowest, counts, left, key, index, count, *rest, BLOCK=block, num_warps=4,
    )  # fmt: skip
    solved = Selection(tau, expiry, sat_end, sup_end, interior)
    _threshold(left, count, solved, rows, m, m, k, 0, config)
    _run(
        filter_t.expand_kernel, (_cdiv(n, threshold_t.BACK), rows),
        key, index, count, *solved, *results, n, m, k, window, BLOCK=threshold_t.BACK, num_warps=4,
    )  # fmt: skip


def _threshold(
    scores: Tensor, count: Tensor | None, results: Selection, rows: int, n: int, m: int, k: int, window: int,
    config: Config,
) -> None:  # fmt: skip
    """The threshold of rows of m of n scores; of as many as ``count`` says, with room for m, where there is one."""
    tau, expiry, sat_end, sup_end, interior = results
    chunk, fine, few, stretches, span, blocks = threshold_t.cuts(m, k, config["CHUNK"])
    walks = _cdiv(stretches, max(1, threshold_t.PROGRAMS // (2 * rows)))
    programs = _cdiv(stretches, walks)
    sort, ring, tasks = config["SORT"], threshold_t.ring(config), 2 * rows * programs
    listed = chunk + crossing.KEYS.value
    table, first_x, places, new_x, change, events, sums = _carve(
        scores, torch.int64, rows * (1 + stretches) * 2 * blocks, rows * blocks, rows * m, tasks * listed,
        2 * tasks * chunk, rows * 2 * m, rows * 2 * m,
    )  # fmt: skip
    codes, sorted_codes, minus_at, first_rank, rings, new_t, narrow, order, us, other_order, other_us = _carve(
        scores, torch.int32, *2 * [rows * 2 * m], rows * m, rows * blocks, tasks * ring, tasks * chunk,
        tasks * listed, *4 * [rows * m],
    )  # fmt: skip
    us, other_us = us.view(torch.float32), other_us.view(torch.float32)
    counted = count is not None
    size = count if counted else expiry
    _run(
        sort_t.sort_kernel, (_cdiv(m, sort) * rows,),
        scores, size, us, order, *results, n, m, rows, SORT=sort, COUNTED=counted, num_warps=config["sort_warps"],
    )  # fmt: skip
    for run in threshold_t.rounds(m, sort):
        block = min(run, 256)
        _run(
            sort_t.merge_kernel, (_cdiv(m, block) * rows,),
            us, order, other_us, other_order, size, m, rows, LOG_RUN=run.bit_length() - 1, RUNS=threshold_t.RUNS,
            BLOCK=block, COUNTED=counted, num_warps=4,
        )  # fmt: skip
        us, order, other_us, other_order = other_us, other_order, us, order
    log = (2 * m).bit_length()
    piece = min(span, threshold_t.PIECE)
    _run(
        events_t.events_kernel, (rows, blocks),
        us, order, events, codes, places, minus_at, sums, sorted_codes, table, first_x, first_rank, size, m, k,
        1 + stretches, fine.bit_length() - 1, few, LOG=log, SPAN=span, STEPS=span.bit_length(),
        CHUNK_LOG=chunk.bit_length() - 1, LOG_PIECE=piece.bit_length() - 1, TIMES=threshold_t.TIMES,
        BLOCK=min(512, span), COUNTED=counted, num_warps=8 if piece > 512 else 4,
    )  # fmt: skip
    for first in range(0, stretches, programs):
        _run(
            walk_t.walk_kernel, (rows, 2 * min(programs, stretches - first)),
            scores, table, first_x, first_rank, us, events, codes, order, places, minus_at, rings, new_t, new_x, narrow,
            change, tau, interior, expiry, sat_end, sup_end, size, first, stretches, blocks, m, n, window, k, fine, few,
            LOG=log, BLOCKS=next_pow2(blocks), SPAN=span, C=chunk, NARROW_BITS=threshold_t.narrow_bits(chunk),
            WINDOW=config["WINDOW"], SCAN=config["SCAN"], RING=ring, SUBS=threshold_t.parts(chunk), COUNTED=counted,
            num_warps=config["walk_warps"], maxnreg=config["walk_registers"],
        )  # fmt: skip


def schedule(scores: Tensor, selection: Selection, k: int, window: int, config: Config) -> Schedule | None:
    """The lists of keys per segment; None where no key is a candidate of any query (``window >= N``)."""
    expiry = selection.expiry
    n = expiry.shape[-1]
    rows, m = expiry.numel() // n, n - window
    if m <= 0:
        return None
    segment = config["SEGMENT"]
    cap, segments = min(k, m), _cdiv(n, segment)
    parent, count, parents, parent_size = expiry, expiry, 1, 0
    keys, starts, blocks = expiry, expiry, _cdiv(m, schedule_t.STRIDE)
    sizes = schedule_t.levels(segment, n)[:-1]
    if sizes:
        keys, starts, counts = _carve(expiry, torch.int32, rows * m, rows * (blocks + 1), rows * blocks)
        meta = {"BLOCK": schedule_t.STRIDE, "num_warps": 4}
        _run(schedule_t.count_kernel, (blocks, rows), expiry, counts, n, m, window, **meta)
        _run(schedule_t.list_kernel, (blocks, rows), expiry, counts, keys, starts, n, m, window, **meta)
    for size in sizes:
        nodes = _cdiv(n, size)
        children, counts = _carve(expiry, torch.int32, rows * nodes * cap, rows * nodes)
        _run(
            schedule_t.alive_kernel, (nodes, rows),
            expiry, keys, starts, parent, count, children, counts, n, m, window, parents, blocks, cap, SIZE=size,
            PARENT_SIZE=parent_size, BLOCK=schedule_t.READ, STRIDE=schedule_t.STRIDE, num_warps=config["num_warps"],
        )  # fmt: skip
        parent, count, parents, parent_size = children, counts, nodes, size
    stay, evicted = _carve(expiry, torch.int32, rows * segments * cap, rows * n)
    entries = (rows, segments, cap + segment)
    out = Schedule(
        expiry.new_empty(entries),
        scores.new_empty(entries),
        expiry.new_empty(entries),
        expiry.new_empty(entries),
        expiry.new_empty((rows, segments, 5)),
        expiry.new_empty((rows, n)),
        expiry.new_empty((rows, n)),
        expiry.new_empty((rows, n)),
        segment,
    )
    _run(
        schedule_t.segments_kernel, (segments, rows),
        scores, expiry, selection.sat_end, keys, starts, parent, count, stay, evicted, *out[:8], n, m, window, parents,
        blocks, cap, cap + segment, SEGMENT=segment, PARENT_SIZE=parent_size, BLOCK=config["BLOCK"],
        READ=config["BLOCK"] if sizes else schedule_t.READ, STRIDE=schedule_t.STRIDE, num_warps=config["num_warps"],
        maxnreg=config["registers"],
    )  # fmt: skip
    return out


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
        return [like] * 8, 1, 1, 1 << 30
    return list(sched[:8]), sched.keys.shape[1], sched.keys.shape[2], sched.segment


def _tile(config: Config) -> dict[str, Any]:
    return {name: config[name] for name in ("BM", "BN", "num_warps", "num_stages")} | {"maxnreg": config["registers"]}


def _dense_rows(t: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def forward(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, sched: Schedule | None, window: int, scale: float,
    gate: str, config: Config,
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
        dout, query, key, value, out, lse, selection.tau, selection.interior, *lists, grad, delta, gbar,
        *dout.stride()[:3], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *grad.stride()[:3], s.n, window, scale, segments, cap, s.kv_heads, **s.meta, SELECTED=sched is not None,
        WINDOW=window > 0, SEGMENT=segment, **_tile(config),
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
            dout, query, key, value, lse, delta, selection.expiry, *band, dk, dv, *strides, *dk.stride()[:3],
            *dv.stride()[:3], s.n, window, scale, s.kv_heads, **meta, **tile,
        )  # fmt: skip
    if sched is not None and gate != "none":
        prefix = tuple(du.new_empty((s.rows, size), dtype=torch.float64) for size in (s.n + 1, chunks))
        _run(dkv_t.prefix_kernel, (chunks, s.rows), gbar, *prefix, s.n, chunks, BLOCK=dkv_t.CHUNK, num_warps=4)
        _run(dkv_t.offsets_kernel, (s.rows,), prefix[1], chunks, BLOCK=1024, num_warps=4)
    meta = {name: s.meta[name] for name in ("D", "BD", "GATE", "WIDE")}
    _run(
        dkv_t.reduce_kernel, (_cdiv(s.n, config["BLOCK"]), s.rows),
        *parts, *band, *prefix, selection.expiry, selection.sat_end, selection.sup_end, lists[0], *lists[4:],
        dk, dv, du,
        *dk.stride()[:3], *dv.stride()[:3], s.n, s.n - window, window, segments, chunks, cap, s.kv_heads, **meta,
        SELECTED=sched is not None, WINDOW=window > 0, SEGMENT=segment, PREFIX=dkv_t.CHUNK, BLOCK=config["BLOCK"],
        STEPS=dkv_t.search_steps(cap - segment), num_warps=config["reduce_warps"],
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
    out, lse = forward(query, key, value, selection, sched, window, scale, gate, configs["forward"])
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
