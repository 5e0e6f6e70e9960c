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
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from sparsek_tune.tune.channel import Worker

TIMEOUT = 300.0  # seconds for one case's kernels to be compiled and checked
TIMES = ("threshold", "schedule", "forward", "dq", "dkv", "index", "forward in all", "forward + backward")


class Side:
    """In a version's process: what it makes of one case at a time."""

    def prepare(self, text: str, distribution: str, recorded: str) -> tuple[dict[str, float], dict[str, str]]:
        """Relative error, and md5, by name of the result, of the case that is timed from now on."""
        from sparsek_tune import dispatch
        from sparsek_tune.bench import check, inputs, machine, ours
        from sparsek_tune.bench.cases import Case
        from sparsek_tune.kernel_templates import TEMPLATES
        from sparsek_tune.presets import shapes
        from sparsek_tune.problem import current_device
        from sparsek_tune.reference import Selection

        device = current_device()
        self._runs: dict[str, Any] = {}  # the tensors of the case before go first
        self._gpu = machine.Cuda(device.l2)
        self._gpu.free()
        (shape,) = shapes((), (text,))
        i = inputs.make(
            Case(shape, distribution), 0, self._gpu.device, inputs.load(Path(recorded)) if recorded else None
        )
        self._configs = {name: template.default(shape.problem, device) for name, template in TEMPLATES.items()}
        made = ours.stages(i, self._configs)
        both = ours.forward_backward(i)
        self._runs = {
            **made.run, "index": made.find, "forward in all": ours.forward(i), "forward + backward": both,
        }  # fmt: skip
        with dispatch.override(self._configs):
            short = check.at_reduced_length(shape.problem, self._configs, self._gpu.device, 0)
            errors = {**check.at_length(i, shape.dtype, 0).errors, "du": short.errors.get("du", 0.0)}
            results = {**ours.results(i)._asdict(), **dict(zip(("dq", "dk", "dv", "du"), both(), strict=False))}
        results |= dict(zip(Selection._fields, made.index, strict=False))
        return errors, {name: _hash(t) for name, t in results.items()}

    def times(self, seconds: float) -> dict[str, float]:
        from sparsek_tune import dispatch

        with dispatch.override(self._configs):
            return {name: self._gpu.time(run, seconds).median for name, run in self._runs.items()}


def _hash(t: Any) -> str:
    import torch

    return hashlib.md5(t.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


def start(checkout: Path, scratch: Path) -> Worker:
    """The process of a checkout's version."""
    package = scratch / "sparsek_tune"  # as it is installed: the templates and the database are parts of it
    package.mkdir(parents=True)
    for source in (*(checkout / "sparsek_tune").iterdir(), checkout / "kernel_templates", checkout / "db"):
        (package / source.name).symlink_to(source.resolve())
    path = os.pathsep.join((str(scratch), str(Path(__file__).resolve().parent)))
    return Worker("versions:Side", env={"PYTHONPATH": path})


def compare(sides: list[Any], case: tuple[str, str, str], turns: int, seconds: float) -> None:
    """Prints one case: shape, distribution, file of recorded tensors."""
    (errors, hashes), (new_errors, new_hashes) = (side.call("prepare", *case, timeout=TIMEOUT) for side in sides)
    taken = [[side.call("times", seconds, timeout=TIMEOUT) for side in sides] for _ in range(turns)]
    print(f"\n{case[0]} {case[1]}\n{'':24}{'old':>9}{'new':>9}{'old/new':>9}")
    for name in TIMES:
        a, b = (statistics.median(turn[side][name] for turn in taken) for side in (0, 1))
        print(f"{name:24}{a:9.4f}{b:9.4f}{a / b:9.3f}")
    for name, error in errors.items():
        print(f"error of {name:15}{error:9.1e}{new_errors[name]:9.1e}")
    same = [name for name, x in hashes.items() if new_hashes[name] == x]
    print(f"same bits: {', '.join(same) or 'none'} of {', '.join(hashes)}", flush=True)


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
        sides = [start(checkout, Path(scratch) / str(side)) for side, checkout in enumerate(options.checkouts)]
        try:
            for shape in options.shape or ["n=65536,k=1024,w=0", "n=65536,k=512,w=512", "n=4096,k=512,w=0"]:
                for distribution in options.distribution or ["iid"]:
                    recorded = options.recorded if distribution == "trained" else ""
                    compare(sides, (shape, distribution, recorded), options.turns, options.seconds)
        finally:
            for side in sides:
                side.close()


if __name__ == "__main__":
    main()
