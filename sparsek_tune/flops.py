"""How many floating point operations the operators count as, from their arguments' shapes."""

from __future__ import annotations


def attention_flops(query_shape, key_shape, value_shape, scores_shape, k, window, *args, **kwargs) -> int:
    """4 D per query head and (query, key) pair; query i attends ``min(i + 1, k + window)`` keys. The selection
    multiplies nothing and is not counted."""
    batch, heads, n, d = query_shape
    full = min(n, k + window)
    pairs = full * (full + 1) // 2 + (n - full) * full
    return 4 * batch * heads * d * pairs


def backward_flops(dout_shape, *args, **kwargs) -> int:
    """Five matrix products where the forward pass has two."""
    inputs, options = args[:4], args[11:]
    return attention_flops(*inputs, *options) * 5 // 2
