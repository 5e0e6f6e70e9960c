"""FlexAttention with the same sparsity, as strong as it can be made: keys sorted by expiry, block mask from intervals.

Key j is seen by the queries [j, expiry_j), window included. First come the keys that are selected at all, then those
that only a window sees, by position; without a window nobody sees them, and their blocks are empty. The first are
sorted by expiry, so that those that are dropped together lie together, or by position, where scores rise: whichever
leaves fewer blocks. KV heads become batches: each has an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparsek_tune.ops import sparsek_select
from sparsek_tune.tune.stages import Inputs

BLOCK = 128


class Permuted(NamedTuple):
    """query, dout [rows, G, N, D]; key, value [rows, 1, N, D]; born, expiry [rows, N] int32: the key at a place of the
    new order is seen by the queries [born, expiry). rows: batches times KV heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    born: Tensor
    expiry: Tensor


def arrange(i: Inputs) -> tuple[Permuted, BlockMask]:
    """The inputs with the keys of every KV head in the order that leaves fewer blocks, and its block mask."""
    found = [(p, block_mask(p.born, p.expiry)) for p in (permute(i, "expiry"), permute(i, "position"))]
    return min(found, key=lambda pair: count(pair[1]))


def count(mask: BlockMask) -> int:
    """The number of blocks that are computed."""
    assert mask.full_kv_num_blocks is not None
    return int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())


def permute(i: Inputs, by: str) -> Permuted:
    """The inputs with the keys of every KV head in order; by: "expiry" or "position"."""
    expiry = sparsek_select(i.scores, i.k, window=i.window)[1].flatten(0, 1)
    n, heads = expiry.shape[1], i.key.shape[1]
    never = expiry <= torch.arange(n, device=expiry.device) + i.window
    rank = expiry.long() if by == "expiry" else torch.arange(n, device=expiry.device)
    order = (rank + never * (n + 1)).argsort(dim=-1, stable=True)
    expiry = expiry.gather(1, order)
    query, dout = (x.unflatten(1, (heads, -1)).flatten(0, 1).contiguous() for x in (i.query, i.dout))
    index = order[..., None].expand(*order.shape, i.key.shape[-1])
    key, value = (x.flatten(0, 1).gather(1, index)[:, None].contiguous() for x in (i.key, i.value))
    return Permuted(query, key, value, dout, order.int().contiguous(), expiry.contiguous())


def seen(born: Tensor, expiry: Tensor) -> Callable[..., Tensor]:
    """The mask_mod: batch, head, query and position of the key -> whether the query sees it."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (born[b, kv] <= q) & (q < expiry[b, kv])

    return mask_mod


def block_mask(born: Tensor, expiry: Tensor, block: int = BLOCK) -> BlockMask:
    """The block mask of keys seen by the queries [born, expiry), both [rows, N]; exact, without an N x N tensor.

    A block is in the mask where one key is seen by one query of it, and full where every key is by every query.
    """
    n = born.shape[1]
    blocks = -(-n // block)
    parts = [_row(b, e, block, blocks) for b, e in zip(born.long(), expiry.long(), strict=True)]
    partial_count, partial, full_count, full = (torch.stack(x)[:, None] for x in zip(*parts, strict=True))
    return BlockMask.from_kv_blocks(
        partial_count, partial, full_count, full, BLOCK_SIZE=block, mask_mod=seen(born, expiry), seq_lengths=(n, n)
    )


def _row(born: Tensor, expiry: Tensor, block: int, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per block of queries: number [blocks] and list [blocks, blocks] of the partial blocks, and of the full ones."""
    alive = expiry > born
    any_count = _touch(born // block, (expiry - 1) // block + 1, alive, block, blocks)
    first, last = -(-born // block), expiry // block
    all_count = _touch(first, last, alive & (last > first), block, blocks)
    full = all_count == block
    return *_ordered((any_count > 0) & ~full), *_ordered(full)


def _touch(start: Tensor, stop: Tensor, use: Tensor, block: int, blocks: int) -> Tensor:
    """[blocks of queries, blocks of keys]: how many keys of the block have the block of queries in [start, stop)."""
    change = torch.zeros((blocks + 1) * blocks, dtype=torch.int32, device=start.device)
    column = torch.arange(len(start), device=start.device) // block
    one = use.int()
    change.scatter_add_(0, start.clamp(0, blocks) * blocks + column, one)
    change.scatter_add_(0, stop.clamp(0, blocks) * blocks + column, -one)
    return change.view(blocks + 1, blocks).cumsum(0, dtype=torch.int32)[:blocks]


def _ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the number of set columns, and the columns with the set ones first, ascending; int32."""
    index = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), index.int().contiguous()


def prepare(i: Inputs, compile: bool = True) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]:
    """(function of query, key, value; these tensors; dout), all permuted. compile: False runs it in eager mode, by
    definition: slow, and without the block mask's help. The output is [rows, G, N, D]."""
    p, mask = arrange(i)
    if compile:
        torch._dynamo.reset()  # every case is compiled for its own sizes
    call = torch.compile(flex_attention, dynamic=False) if compile else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, block_mask=mask, scale=i.scale, enable_gqa=True)  # pyright: ignore

    return attend, (p.query, p.key, p.value), p.dout
