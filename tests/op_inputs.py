"""Inputs that the tests of the operators share, and attention written out densely."""

from __future__ import annotations

import math

import torch

from sparsek_tune import ops

LENGTHS = (20, 37, 64, 100)
OPTIONS = (7, 5, 0.3, "kv")  # k, window, scale, gate


def make(n=24, b=2, hq=4, hkv=2, d=8, dtype=torch.float32, grad=False, permuted=False, seed=0):
    """query, key, value, scores; ``permuted``: storage [B, N, H, D] and [B, N, H] as models have it."""
    g = torch.Generator().manual_seed(seed + n)

    def one(heads, *tail):
        shape = (b, n, heads, *tail) if permuted else (b, heads, n, *tail)
        t = torch.randn(shape, generator=g, dtype=torch.float64)
        t = (t.transpose(1, 2) if permuted else t).to(torch.float32 if not tail and dtype.itemsize < 8 else dtype)
        return t.requires_grad_(grad)

    return one(hq, d), one(hkv, d), one(hkv, d), one(hkv)


def dense_attention(query, key, value, scores, k, window, scale, gate):
    """Section 1 of the design, literally: one query at a time, tau by bisection."""
    b, hq, n, _ = query.shape
    hkv = key.shape[1]
    out = torch.empty_like(query)
    for row in range(b * hq):
        i_b, i_h = divmod(row, hq)
        q, kv = query[i_b, i_h], i_h // (hq // hkv)
        kk, vv, u = key[i_b, kv], value[i_b, kv], scores[i_b, kv].tolist()
        for i in range(n):
            candidates = list(range(i - window + 1))
            chosen = sorted(candidates, key=lambda j: (-u[j], j))[:k]
            tau = -math.inf
            if len(candidates) > k:
                low, high = min(u) - 2, max(u) + 2
                for _ in range(80):
                    mid = (low + high) / 2
                    total = sum(min(max(u[j] - mid, 0), 1) for j in candidates)
                    low, high = (mid, high) if total > k else (low, mid)
                tau = high
            keys = [*range(max(0, i - window + 1), i + 1), *chosen] if window else chosen
            m = [1.0 if j > i - window else min(max(u[j] - tau, 0), 1) for j in keys]
            m = torch.tensor(m, dtype=query.dtype)
            logits = scale * (kk[keys] @ q[i]) * (m if gate == "kv" else 1)
            out[i_b, i_h, i] = (torch.softmax(logits, 0) * (m if gate != "none" else 1)) @ vv[keys]
    return out


def attention_args(grad=False, **kwargs):
    return (*make(grad=grad, **kwargs), *OPTIONS)


def backward_args(**kwargs):
    args = attention_args(**kwargs)
    out, *rest = ops.ATTENTION(*args)
    return (torch.randn_like(out), *args[:4], out, *rest, *OPTIONS)
