"""Forward and forward + backward beside cuDNN SDPA, in one run: B = 1, 32 query and 8 KV heads, D = 128, bf16.

python benchmarks/beside_sdpa.py

Prints medians (ms) of `triton.testing.do_bench` through the public operator, index stages counted, and the grades of
the configs that were served. Scores are normal with deviation 3. Needs a CUDA device with cuDNN attention.
"""

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsek_tune import dispatch, launch
from sparsek_tune.ops import problem_of, sparsek_attention
from sparsek_tune.problem import current_device

CASES = ((4096, 1024, 512), (16384, 1024, 512), (65536, 1024, 512), (65536, 1024, 0))  # N, k, window


def bench(f):
    return triton.testing.do_bench(f, warmup=25, rep=150, return_mode="median")


def heads(n, count):
    x = torch.randn(1, n, count, 128, device="cuda", dtype=torch.bfloat16)
    return x.transpose(1, 2).requires_grad_()


def sparse(n, k, w, q, key, v, dout):
    """Grades, and times of threshold, schedule, forward and forward + backward."""
    u = (torch.randn(1, 8, n, device="cuda") * 3).requires_grad_()
    problem = problem_of(q, key, k, w, "kv")
    grades = {r.grade for r in dispatch.resolve(problem, current_device()).values()}
    configs = dispatch.configs(problem, 0)

    def forward():
        with torch.no_grad():
            return sparsek_attention(q, key, v, u, k, window=w)

    def both():
        torch.autograd.grad(sparsek_attention(q, key, v, u, k, window=w), (q, key, v, u), dout)

    with torch.no_grad():
        scores = u.detach()
        selection = launch.threshold(scores, k, w, configs["threshold"])
        threshold = bench(lambda: launch.threshold(scores, k, w, configs["threshold"]))
        schedule = bench(lambda: launch.schedule(selection, k, w, configs["schedule"]))
    return grades, threshold, schedule, bench(forward), bench(both)


def dense(q, key, v, dout):
    """Times of forward and forward + backward of causal SDPA on cuDNN."""
    q, key, v = (x.detach().contiguous().requires_grad_() for x in (q, key, v))

    def attend():
        return F.scaled_dot_product_attention(q, key, v, is_causal=True, enable_gqa=True)

    def forward():
        with torch.no_grad():
            return attend()

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return bench(forward), bench(lambda: torch.autograd.grad(attend(), (q, key, v), dout))


def main():
    torch.manual_seed(0)
    for n, k, w in CASES:
        q, key, v = heads(n, 32), heads(n, 8), heads(n, 8)
        dout = torch.randn(1, 32, n, 128, device="cuda", dtype=torch.bfloat16)
        grades, threshold, schedule, forward, both = sparse(n, k, w, q, key, v, dout)
        dense_forward, dense_both = dense(q, key, v, dout)
        print(
            f"N {n:6} k {k} w {w:3} {'/'.join(sorted(grades)):12} threshold {threshold:.3f} schedule {schedule:.3f} "
            f"forward {forward:.3f} both {both:.3f} | cuDNN {dense_forward:.3f} {dense_both:.3f} | "
            f"{dense_forward / forward:.2f}x {dense_both / both:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
