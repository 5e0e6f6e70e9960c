"""What a user can pick instead, each made ready on the same inputs. FlexAttention has a file of its own.

A peer computes what it can, which is not always the same: its note says what. Nothing here runs before ``prepare``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsek_tune.bench import flex
from sparsek_tune.bench.cases import PEERS, Case
from sparsek_tune.tune.stages import Inputs

# (function of query, key, value; these tensors; gradient of the output)
Attend = tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]
Make = Callable[[Inputs], Attend]


class Unfit(RuntimeError):
    """The peer cannot run this case; says why."""


class Peer(NamedTuple):
    """attend: makes the peer ready for a case.

    package: (import name, distribution) where one is needed. quadratic: cost grows with the square of the length.
    scored: whether its time depends on the scores; where not, distributions with the same query share one timing.
    exact: whether its output is that of SparseK with gate "none", so that it can be checked.
    """

    name: str
    note: str
    attend: Make
    package: tuple[str, str] | None = None
    quadratic: bool = False
    scored: bool = True
    exact: bool = False

    def missing(self) -> str | None:
        """Why the peer cannot be tried at all, or None."""
        if self.package and importlib.util.find_spec(self.package[0]) is None:
            return f"the package {self.package[1]} is not installed"
        return None

    def version(self) -> str:
        if self.package is None:
            return f"torch {torch.__version__}"
        try:
            return version(self.package[1])
        except PackageNotFoundError:  # copied to where it is, not installed
            return "unknown"

    def key(self, case: Case) -> tuple[Any, ...]:
        """Cases with equal keys have equal timings."""
        s = case.shape
        if self.scored:
            return self.name, case
        data = "recorded" if case.distribution == "trained" else "random"
        return self.name, s.b, s.hq, s.hkv, s.n, s.d, s.dtype, data


class Ready(NamedTuple):
    """A peer on a case. forward: without gradients, returns the output. both: forward and the gradients."""

    forward: Callable[[], Tensor]
    both: Callable[[], Any]


def ready(peer: Peer, i: Inputs) -> Ready:
    """``peer`` ready to be called on the inputs. Raises Unfit, or whatever the peer raises."""
    attend, tensors, dout = peer.attend(i)
    leaves = tuple(t.detach().requires_grad_() for t in tensors)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*tensors)

    return Ready(forward, lambda: torch.autograd.grad(attend(*leaves), leaves, dout))


def _contiguous(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return i.query.contiguous(), i.key.contiguous(), i.value.contiguous(), i.dout.contiguous()


def _dense(backend: str) -> Make:
    def make(i: Inputs) -> Attend:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        choice = [getattr(SDPBackend, backend)]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(choice):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=i.scale, enable_gqa=True)

        q, k, v, dout = _contiguous(i)
        return attend, (q, k, v), dout

    return make


ADASPLASH_LONGEST = 32768  # it compiles and times 60 configs anew at every length: minutes beyond this one


def _adasplash(i: Inputs) -> Attend:
    from adasplash import adasplash_v2  # pyright: ignore[reportMissingImports]

    n, d = i.query.shape[2:]
    if n & (n - 1) or n < 64:
        raise Unfit(f"the length must be a power of two of at least 64, but is {n}")
    if n > ADASPLASH_LONGEST:
        raise Unfit(f"its autotuner starts anew at every length, and takes minutes above {ADASPLASH_LONGEST}")
    if d not in (16, 32, 64, 128, 256):
        raise Unfit(f"the head size must be 16, 32, 64, 128 or 256, but is {d}")
    q, k, v, dout = _contiguous(i)
    return adasplash_v2, (q, k, v), dout


NSA_BLOCK, NSA_GROUP = 64, 16  # keys of a block; the fewest query heads per KV head that its kernels take


def _nsa(i: Inputs) -> Attend:
    from fla.ops.nsa import parallel_nsa  # pyright: ignore[reportMissingImports]

    hkv = nsa_kv_heads(i.query.shape[1], i.key.shape[1])
    blocks = nsa_blocks(i.scores[:, :hkv], max(1, (i.k + i.window) // NSA_BLOCK))
    count = blocks.shape[-1]
    q, k, v, dout = (x.transpose(1, 2).contiguous() for x in (i.query, i.key[:, :hkv], i.value[:, :hkv], i.dout))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_nsa(q, k, v, block_indices=blocks, block_counts=count, block_size=NSA_BLOCK, scale=i.scale)

    return attend, (q, k, v), dout


def nsa_kv_heads(hq: int, hkv: int) -> int:
    """The KV heads for NSA: those there are, or as few as give each of them NSA_GROUP query heads. Raises Unfit."""
    heads = min(hkv, max(1, hq // NSA_GROUP))
    group = hq // heads
    if hq % heads or group < NSA_GROUP or group & (group - 1):
        raise Unfit(f"query heads per KV head must be a power of two of at least {NSA_GROUP}: {hq} heads give none")
    return heads


def nsa_blocks(scores: Tensor, count: int) -> Tensor:
    """Blocks of keys for every query, as NSA wants them: int64 [B, N, H, S], ascending, -1 for none.

    scores: [B, H, N]. A query takes its own block and the ``count - 1`` before it with the highest scores; S is
    ``count``, rounded up to a power of two, which the kernels want. Neighbours choose nearly alike, as in SparseK.
    """
    n = scores.shape[-1]
    best = F.pad(scores, (0, -n % NSA_BLOCK), value=-torch.inf).unflatten(-1, (-1, NSA_BLOCK)).amax(-1)  # [B, H, NB]
    blocks = best.shape[-1]
    size = 1 << (count - 1).bit_length()
    chosen = scores.new_full((*best.shape, size), -1, dtype=torch.int64)
    here = torch.arange(blocks, device=scores.device)
    for start in range(0, blocks, 512):  # in parts: all at once would be quadratic in memory
        rows = here[start : start + 512, None]
        value = best[:, :, None].masked_fill(here > rows, -torch.inf).masked_fill(here == rows, torch.inf)
        top = value.topk(min(count, blocks), dim=-1).indices
        top = (
            top.masked_fill(top > rows, blocks).sort(dim=-1).values
        )  # later blocks, chosen for want of others, go last
        chosen[:, :, start : start + 512, : top.shape[-1]] = top.masked_fill(top == blocks, -1)
    return chosen.repeat_interleave(NSA_BLOCK, dim=2)[:, :, :n].transpose(1, 2).contiguous()


_ALL = (
    Peer("cudnn", "dense causal SDPA on cuDNN", _dense("CUDNN_ATTENTION"), quadratic=True, scored=False),
    Peer("flash", "dense causal SDPA on FlashAttention-2", _dense("FLASH_ATTENTION"), quadratic=True, scored=False),
    Peer(
        "flex",
        "compiled FlexAttention on the same keys: selected and sorted by expiry beforehand, block mask built "
        "beforehand, no gates (neither time nor gradient of the selection is counted: all of this favours it)",
        flex.prepare,
        exact=True,
    ),
    Peer(
        "nsa",
        "fla-core parallel_nsa with as many keys, in blocks of 64 chosen beforehand; it wants 16 query heads per KV "
        "head: where there are fewer, it gets fewer KV heads, and reads less",
        _nsa,
        ("fla", "fla-core"),
    ),
    Peer(
        "adasplash",
        "adasplash_v2: entmax instead of softmax, as sparse as the logits make it (random ones: hardly)",
        _adasplash,
        ("adasplash", "adasplash"),
        scored=False,
    ),
)
BY_NAME = {peer.name: peer for peer in _ALL}
assert tuple(BY_NAME) == PEERS
