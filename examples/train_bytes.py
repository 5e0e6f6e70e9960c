"""Train a small decoder with SparseK attention on the Python standard library's own source files, byte by byte.

    python examples/train_bytes.py --steps 300 --context 8192                     # SparseK
    python examples/train_bytes.py --steps 300 --context 8192 --attention dense   # the same with SDPA

Each attention layer scores its keys with one linear map per KV head, plus a slope over positions that lets old keys
drain out: ``u_i = W x_i + 1e-3 i``. A query attends its last ``--window`` keys and the ``--k`` best scored before them.

    python examples/train_bytes.py --dim 1024 --record trained.pt --record-length 131072

also records what the attention of the trained model was given, all layers side by side along the heads, as input for
``sparsek-tune bench --distribution trained --recorded trained.pt``: these sizes give 32 query and 8 KV heads of 128.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsek_tune import ops
from sparsek_tune.ops import sparsek_attention

SLOPE = 1e-3  # of the scores over positions


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, sparse or dense."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.heads, self.kv_heads, self.head = args.heads, args.kv_heads, args.dim // args.heads
        self.sparse, self.k, self.window = args.attention == "sparse", args.k, args.window
        self.qkv = nn.Linear(args.dim, (self.heads + 2 * self.kv_heads) * self.head, bias=False)
        self.out = nn.Linear(args.dim, args.dim, bias=False)
        if self.sparse:
            self.scorer = nn.Linear(args.dim, self.kv_heads, bias=False)

    def project(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, Hq, N, D], key and value [B, Hkv, N, D]."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head)).transpose(1, 2)  # [B, H, N, D], stored as [B, N, H, D]
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return rotate(query, angles), rotate(key, angles), value

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        b, n, dim = x.shape
        query, key, value = self.project(x, angles)
        if self.sparse:
            y = sparsek_attention(query, key, value, self.scores(x), self.k, window=self.window)
        else:
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, n, dim))

    def scores(self, x: Tensor) -> Tensor:
        """One score per key and KV head [B, Hkv, N], in float32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            u = F.linear(x.float(), self.scorer.weight)
            return u.transpose(1, 2) + SLOPE * torch.arange(x.shape[1], device=x.device)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding of x [B, H, N, D] by angles [N, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(args.dim) for _ in range(2))
        self.attention = Attention(args)
        self.mlp = nn.Sequential(nn.Linear(args.dim, 4 * args.dim), nn.GELU(), nn.Linear(4 * args.dim, args.dim))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), angles)
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    """Bytes [B, N] and the bytes that follow them [B, N] -> mean cross entropy (nats per byte)."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.embed = nn.Embedding(256, args.dim)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.dim)
        self.head = nn.Linear(args.dim, 256, bias=False)
        half = args.dim // args.heads // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("angles", torch.outer(torch.arange(max(args.context, args.record_length)), frequencies))

    def forward(self, text: Tensor, target: Tensor) -> Tensor:
        x = self.embed(text)
        for block in self.blocks:
            x = block(x, self.angles[: text.shape[1]])
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), target.flatten())


def corpus(limit: int = 32 << 20) -> Tensor:
    """The standard library's Python files, one after the other, as bytes [<= limit]."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts))
    text = bytearray()
    for path in files:
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def batch(text: Tensor, args: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - args.context, (args.batch,), generator=generator).tolist()
    rows = torch.stack([text[s : s + args.context + 1] for s in starts]).to(args.device).long()
    return rows[:, :-1], rows[:, 1:]


def grades(args: argparse.Namespace) -> dict[str, str]:
    """How well the config of every kernel matches this problem and this device."""
    if args.attention == "dense":
        return {"attention": "torch.nn.functional.scaled_dot_product_attention"}
    if torch.device(args.device).type == "cpu":
        return {"attention": "reference: the CPU runs no kernels"}
    from sparsek_tune import dispatch
    from sparsek_tune.problem import current_device

    shape = (args.batch, args.heads, args.context, args.dim // args.heads)
    query = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    problem = ops.problem_of(query, query[:, : args.kv_heads], args.k, args.window, "kv")
    plan = dispatch.resolve(problem, current_device(torch.device(args.device).index or 0))
    return {name: f"{r.grade}: {r.reason}" for name, r in plan.items()}


@torch.no_grad()
def record(model: Decoder, text: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """What every attention layer is given in one forward pass over the first ``--record-length`` bytes.

    Returns query [1, layers * Hq, L, D], key and value [1, layers * Hkv, L, D] (bfloat16) and scores
    [1, layers * Hkv, L] (float32), on the CPU.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("query", "key", "value", "scores")}

    def hook(attention: Attention, inputs: tuple[Tensor, Tensor]) -> None:
        tensors = (x.bfloat16() for x in attention.project(*inputs))
        for name, x in zip(found, (*tensors, attention.scores(inputs[0])), strict=True):
            found[name].append(x.cpu())

    for block in model.blocks:
        block.attention.register_forward_pre_hook(hook)
    row = text[None, : args.record_length + 1].to(args.device).long()
    with autocast(args):
        model(row[:, :-1], row[:, 1:])
    return {name: torch.cat(layers, dim=1).contiguous() for name, layers in found.items()}


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 on a GPU."""
    kind = torch.device(args.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def train(args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    text = corpus()
    model = Decoder(args).to(args.device)
    scorers = [block.attention.scorer.weight for block in model.blocks if args.attention == "sparse"]
    before = [w.detach().clone() for w in scorers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=min(20, args.steps))
    step_loss = torch.compile(model, fullgraph=True, backend=args.backend)

    losses: list[Tensor] = []
    start = 0.0
    for step in range(args.steps):
        with autocast(args):
            loss = step_loss(*batch(text, args, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        losses.append(loss.detach())
        if step % args.log_every == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {losses[-1].item():.4f}", flush=True)
        if step == 0:  # which compiled everything
            start = time.perf_counter()
    seconds = time.perf_counter() - start if args.steps > 1 else math.nan
    if args.record:
        torch.save(record(model, text, args), args.record)
    return {
        "attention": args.attention,
        "losses": [x.item() for x in losses],
        "tokens_per_second": (args.steps - 1) * args.batch * args.context / seconds,
        "grades": grades(args),
        "scorer_moved": [((w - w0).norm() / w0.norm()).item() for w, w0 in zip(scorers, before, strict=True)],
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", choices=["sparse", "dense"], default="sparse")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--context", type=int, default=8192, help="bytes per sequence")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--k", type=int, default=512, help="keys selected per query")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write losses and all that is printed at the end")
    parser.add_argument("--record", type=Path, metavar="FILE", help="save the trained model's queries, keys, ... there")
    parser.add_argument("--record-length", type=int, default=0, help="bytes of that; by default the context")
    args = parser.parse_args(argv)
    args.record_length = args.record_length or args.context
    if args.record and args.attention == "dense":
        parser.error("--record needs --attention sparse: dense attention has no scores")
    if args.record and not args.record.absolute().parent.is_dir():
        parser.error(f"--record: the folder {args.record.absolute().parent} does not exist")
    return args


def main(argv: list[str] | None = None) -> dict[str, object]:
    args = arguments(argv)
    result = train(args)
    print(f"tokens/s {result['tokens_per_second']:.0f}, the first step (compilation) not counted")
    for name, grade in result["grades"].items():
        print(f"config of {name}: {grade}")
    for layer, moved in enumerate(result["scorer_moved"]):
        print(f"layer {layer}: scorer weights moved by {moved:.1%} of their norm")
    if args.json:
        args.json.write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
