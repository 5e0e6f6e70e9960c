"""Two versions of the kernels in one run on one GPU: times of every stage, errors, and whether bits are the same.

    python benchmarks/versions.py OLD NEW [--shape n=65536,k=1024,w=0]... [--distribution iid]... [--recorded FILE]

OLD and NEW are checkouts (``git worktree add ../old COMMIT``). Each runs in a process of its own, and the two take
turns, so that what the machine does in the meantime meets both. Configs are the defaults of each; L2 is cold; a time is
the median over turns of medians, in ms. Errors are relative, against float64 at a sample of queries and keys; those of
du, which has no such sample, are of a short row. OLD must have the functions of ``sparsek_tune.bench`` used here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = ("threshold", "schedule", "forward", "dq", "dkv", "index", "forward in all", "forward + backward")


def work(requests: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """In a version's process: times for every line of ``requests``, errors and hashes for the first of a case."""
    from sparsek_tune import dispatch
    from sparsek_tune.bench import check, inputs, machine, ours
    from sparsek_tune.bench.cases import Case
    from sparsek_tune.kernel_templates import TEMPLATES
    from sparsek_tune.presets import shapes
    from sparsek_tune.problem import current_device

    device = current_device()
    gpu = machine.Cuda(device.l2)
    runs: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    for asked in map(json.loads, requests):
        found: dict[str, Any] = {}
        if asked["turn"] == 0:
            runs.clear()
            gpu.free()
            (shape,) = shapes((), (asked["shape"],))
            recorded = inputs.load(Path(asked["recorded"])) if asked["recorded"] else None
            i = inputs.make(Case(shape, asked["distribution"]), 0, gpu.device, recorded)
            configs = {name: template.default(shape.problem, device) for name, template in TEMPLATES.items()}
            made = ours.stages(i, configs)
            runs = {**made.run, "index": made.find}
            runs |= {"forward in all": ours.forward(i), "forward + backward": ours.forward_backward(i)}
            with dispatch.override(configs):
                short = check.at_reduced_length(shape.problem, configs, gpu.device, 0).errors
                found["errors"] = {**check.at_length(i, shape.dtype, 0).errors, "du": short.get("du", 0.0)}
                tensors = {**ours.results(i)._asdict(), **_named(runs["forward + backward"]())}
            tensors |= {f"index {number}": x for number, x in enumerate(made.index[:5])}
            found["hashes"] = {name: _hash(x) for name, x in tensors.items()}
        with dispatch.override(configs):
            found["times"] = {name: gpu.time(run, asked["seconds"]).median for name, run in runs.items()}
        answer(found)


def _named(gradients: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("dq", "dk", "dv", "du"), gradients, strict=False))


def _hash(t: Any) -> str:
    import torch

    return hashlib.md5(t.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


class Version:
    """A checkout's process."""

    def __init__(self, checkout: Path, scratch: Path) -> None:
        package = scratch / "sparsek_tune"  # as it is installed: the templates and the database are parts of it
        package.mkdir(parents=True)
        for source in (*(checkout / "sparsek_tune").iterdir(), checkout / "kernel_templates", checkout / "db"):
            (package / source.name).symlink_to(source.resolve())
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"], env={**os.environ, "PYTHONPATH": str(scratch)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a version's process ended with exit code {self.process.wait()}")
        return json.loads(line)


def compare(versions: list[Version], request: dict[str, Any], turns: int) -> None:
    """Prints one case."""
    answers = [[v.ask({**request, "turn": turn}) for v in versions] for turn in range(turns)]
    old, new = ([turn[side] for turn in answers] for side in (0, 1))
    print(f"\n{request['shape']} {request['distribution']}\n{'':24}{'old':>9}{'new':>9}{'old/new':>9}")
    for name in TIMES:
        a, b = (statistics.median(x["times"][name] for x in side) for side in (old, new))
        print(f"{name:24}{a:9.4f}{b:9.4f}{a / b:9.3f}")
    for name, error in old[0]["errors"].items():
        print(f"error of {name:15}{error:9.1e}{new[0]['errors'][name]:9.1e}")
    same = [name for name, x in old[0]["hashes"].items() if new[0]["hashes"][name] == x]
    print(f"same bits: {', '.join(same) or 'none'} of {', '.join(old[0]['hashes'])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path, metavar="OLD NEW")
    parser.add_argument("--shape", action="append")
    parser.add_argument("--distribution", action="append", choices=("iid", "slope", "trained"))
    parser.add_argument("--recorded", default="", help="file of a trained model's tensors")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.1, help="for one timing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        versions = [Version(c, Path(scratch) / str(side)) for side, c in enumerate(options.checkouts)]
        for shape in options.shape or ["n=65536,k=1024,w=0", "n=65536,k=512,w=512", "n=4096,k=512,w=0"]:
            for distribution in options.distribution or ["iid"]:
                recorded = options.recorded if distribution == "trained" else ""
                case = {"shape": shape, "distribution": distribution, "recorded": recorded, "seconds": options.seconds}
                compare(versions, case, options.turns)
        for version in versions:
            version.process.stdin.close()  # type: ignore[union-attr]
            version.process.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work(sys.stdin, lambda x: print(json.dumps(x), flush=True))
    else:
        main()
