"""Every template cross-compiles for sm_90 without a GPU: fits shared memory and spill bound, uses wgmma."""

import re
import subprocess

import pytest
import torch
from triton import knobs

from sparsek_tune import launch
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import DTYPE_BYTES, Config
from sparsek_tune.limits import QUERY_BYTES_MAX, query_bytes
from sparsek_tune.problem import Problem, target_device
from sparsek_tune.reference import Selection
from sparsek_tune.tune.compile import kernels_of, use_target

pytestmark = pytest.mark.compile90

DEVICE = target_device("cuda:90")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Bytes of stack per thread that a default config may spill, against 255 x 4 held in registers: on the tensor cores
# outside of loops, once a tile; more in fp32, whose IEEE dots are unrolled (dkv at D = 128: 0 with Triton 3.6, 160 with
# 3.7.1).
MOST_STACK = {"bf16": 96, "fp16": 64, "fp32": 192}


def spilling_loops(cubin: bytes, tmp_path) -> list[str]:
    """The loops around tensor-core products of which more than a fiftieth are accesses to spilled registers."""
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    tool = knobs.nvidia.nvdisasm.path
    text = subprocess.run([tool, "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    lines = text.splitlines()
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    jumps = [(labels.get(m[1], i), i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L\w+)\)", line))]
    loops = ["\n".join(lines[first:last]) for first, last in jumps if first < last]
    products = [loop for loop in loops if "HGMMA" in loop]
    assert products
    return [loop for loop in products if 50 * len(re.findall(r"\b(LDL|STL)\b", loop)) > loop.count("\n")]


def compile_all(problem: Problem, **overrides: dict):
    """All kernels of a forward and a backward pass at the default configs with overrides."""
    use_target(DEVICE)
    configs = {name: Config({**t.default(problem, DEVICE), **overrides.get(name, {})}) for name, t in TEMPLATES.items()}
    for name, config in configs.items():
        assert TEMPLATES[name].check(config, problem, DEVICE) is None
    heads, n, d, dtype = problem.rows, problem.n, problem.d, DTYPES[problem.dtype]
    q, k, v = (torch.empty(1, h, n, d, dtype=dtype, device="meta") for h in (heads * problem.g, heads, heads))
    scores = torch.empty(1, heads, n, device="meta")
    with launch.compile_only() as compiled:
        out, lse, *selection = launch.attention(q, k, v, scores, problem.k, problem.w, 0.1, problem.gate, configs)
        launch.attention_backward(
            out, q, k, v, scores, out, lse, Selection(*selection), problem.k, problem.w, 0.1, problem.gate, configs
        )
    return compiled


@pytest.mark.parametrize(
    "problem",
    [
        Problem.of("bf16", 128, 4, "kv", 1024, 512, 16384, 8),
        Problem.of("fp16", 64, 1, "v", 512, 0, 4096, 12),
        Problem.of("fp16", 64, 1, "v", 512, 512, 4096, 12),
        Problem.of("bf16", 80, 7, "none", 256, 64, 8192, 4),
        Problem.of("bf16", 256, 2, "kv", 512, 512, 8192, 4),
        Problem.of("fp32", 128, 4, "kv", 512, 512, 8192, 8),
        Problem.of("fp32", 32, 16, "kv", 64, 0, 2048, 2),
    ],
    ids=str,
)
def test_defaults_compile_without_spilling(problem, tmp_path):
    compiled = compile_all(problem)
    kernels = [resources() for resources in kernels_of(compiled).values()]
    assert {"walk_kernel", "segments_kernel", "forward_kernel", "dq_kernel", "dkv_kernel", "reduce_kernel"} <= {
        k.name for k in kernels
    }
    for kernel in kernels:
        assert kernel.shared <= DEVICE.smem, kernel
        assert kernel.stack <= MOST_STACK[problem.dtype], kernel
    for c in compiled:
        if "wgmma.mma_async" in c.asm["ptx"]:
            assert not spilling_loops(c.asm["cubin"], tmp_path), c.metadata.name


def test_atomics_are_of_integers():
    compiled = compile_all(Problem.of("bf16", 128, 4, "kv", 512, 0, 8192, 8))
    lines = [line for c in compiled for line in c.asm["ptx"].splitlines() if " atom." in line or " red." in line]
    assert lines and all(".add.u64" in line for line in lines), lines


@pytest.mark.parametrize(("n", "launches"), [(4096, 5), (16384, 6), (65536, 14)])
def test_few_launches_before_the_attention(n, launches):
    """Of threshold and schedule together. Two rounds merge 16384 scores: one of 16 runs takes longer than both. Rows of
    65536 have four launches of the filter, three rounds of merging, and three for schedule's list of selected keys and
    its upper level: each takes less than it saves."""
    use_target(DEVICE)
    problem = Problem.of("bf16", 128, 4, "kv", 1024 if n == 16384 else 512, 512, n, 8)
    first, second = (TEMPLATES[name].default(problem, DEVICE) for name in ("threshold", "schedule"))
    with launch.compile_only() as compiled:
        scores = torch.empty(1, 8, n, device="meta")
        selection = launch.threshold(scores, problem.k, problem.w, first)
        launch.schedule(scores, selection, problem.k, problem.w, second)
    assert len(compiled) == launches


def test_main_shape_runs_on_wgmma():
    compiled = compile_all(Problem.of("bf16", 128, 4, "kv", 1024, 512, 16384, 8))
    for c in compiled:
        if c.metadata.name in ("forward_kernel", "dq_kernel", "dkv_kernel", "band_kernel"):
            assert "wgmma.mma_async" in c.asm["ptx"], c.metadata.name


@pytest.mark.parametrize(
    "overrides",
    [
        {"forward": {"BM": 128, "BN": 64, "num_warps": 8}, "dq": {"BM": 128, "BN": 32, "num_warps": 8}},
        {"dkv": {"BM": 32, "BN": 64, "num_stages": 3}, "schedule": {"SEGMENT": 2048, "BLOCK": 512}},
        {
            "threshold": {"SORT": 2048, "CHUNK": 64, "WINDOW": 256, "walk_warps": 2, "walk_registers": 128},
            "dkv": {"BLOCK": 64, "reduce_warps": 2},
        },
    ],
    ids=["wide tiles", "long segments", "short stretches"],
)
def test_other_points_compile(overrides):
    for resources in kernels_of(compile_all(Problem.of("bf16", 128, 4, "kv", 512, 0, 8192, 8), **overrides)).values():
        kernel = resources()
        assert kernel.shared <= DEVICE.smem, kernel
        assert kernel.stack <= 2 * MOST_STACK["bf16"], kernel


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("d", [32, 128, 256])
@pytest.mark.parametrize("g", [1, 7, 16, 64])
def test_default_is_in_the_space_and_feasible_everywhere(name, dtype, d, g):
    template = TEMPLATES[name]
    if query_bytes(g, d, DTYPE_BYTES[dtype]) > QUERY_BYTES_MAX:
        pytest.skip("the operators refuse it")
    for cc in (80, 86, 90, 120):
        device = target_device(f"cuda:{cc}")
        for k, w, n in ((1, 0, 64), (512, 512, 4096), (4096, 0, 1 << 20)):
            problem = Problem.of(dtype, d, g, "kv", k, w, n, 8)
            config = template.default(problem, device)
            assert template.contains(config)
            assert template.check(config, problem, device) is None, (problem, device.cc)
