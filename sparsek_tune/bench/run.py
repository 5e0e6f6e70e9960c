"""The benchmark: every case by itself, first the package's own operators, then the peers on the same inputs.

What fails is reported and costs nothing else. The document is handed out after every step, so that a run that is killed
loses nothing that was measured.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsek_tune import __version__, dispatch
from sparsek_tune.bench import check, inputs, ours
from sparsek_tune.bench.cases import BACKWARD_FLOPS, STAGES, Case, forward_flops
from sparsek_tune.bench.machine import IN_A_ROW, Machine, Run
from sparsek_tune.bench.peers import Peer, Ready, Unfit, ready
from sparsek_tune.bench.report import SCHEMA
from sparsek_tune.problem import Device
from sparsek_tune.tune import sample
from sparsek_tune.tune.measure import PROTOCOL, Estimate
from sparsek_tune.tune.stages import Inputs
from sparsek_tune.tune.verify import TOLERANCE, relative_error

DENSE_PROBE = 8  # a peer of quadratic cost is tried at this fraction of the length first


class CheckFailed(RuntimeError):
    """Results are wrong, so nothing is timed."""


@dataclass
class Settings:
    """seconds: at most for one timing; peer_limit: seconds that one call of a peer may be expected to take."""

    seconds: float = 0.5
    peer_limit: float = 3.0
    seed: int = 0
    backward: bool = True
    recorded: Mapping[str, Tensor] | None = None


@dataclass
class Bench:
    """One run. note: takes a line of progress; save: takes the document after every step."""

    machine: Machine
    device: Device
    settings: Settings
    note: Callable[[str], Any]
    save: Callable[[dict[str, Any]], Any]
    document: dict[str, Any] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = field(default_factory=dict)
    _lost: str | None = None

    def run(self, cases: Sequence[Case], peers: Sequence[Peer], command: str) -> dict[str, Any]:
        """Measure everything; returns the document (see README). Never raises for a case or a peer that fails."""
        tried = self._start(peers, command)
        entries = self.document["cases"]
        for number, case in enumerate(cases, 1):
            self.note(f"{number}/{len(cases)} {case}")
            entries.append({"problem": asdict(case.shape), "distribution": case.distribution, "peers": {}})
            self._guard(entries[-1], lambda case=case, entry=entries[-1]: self._ours(case, entry))
            self.save(self.document)
        # Peers come last: one that breaks the process's GPU context then takes nothing of the above with it.
        for number, (case, entry) in enumerate(zip(cases, entries, strict=True), 1):
            if tried:
                self.note(f"{number}/{len(cases)} peers: {case}")
                self._peers(case, entry, tried)
                self.save(self.document)
        return self.document

    def _start(self, peers: Sequence[Peer], command: str) -> list[Peer]:
        """The document without cases; the peers that are there."""
        found, missing = [], {}
        for peer in peers:
            why = peer.missing()
            if why:
                missing[peer.name] = why
                self.note(f"peer {peer.name} is left out: {why}")
            else:
                found.append(peer)
        s = self.settings
        self.document.update(
            schema=SCHEMA,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command,
            device=self.device.as_dict(),
            versions={
                "sparsek_tune": __version__, "python": platform.python_version(), "torch": torch.__version__,
                "triton": self.device.triton, "cuda": self.device.cuda, "driver": self.device.driver,
            },
            protocol={
                **PROTOCOL, "input": "iid: normal, scores std 3; slope: + 1e-3 i; trained: recorded", "unit": "ms",
                "seconds": s.seconds, "peer_limit": s.peer_limit, "seed": s.seed,
            },
            peers={p.name: {"note": p.note, "version": p.version()} for p in found},
            missing=missing,
            cases=[],
        )  # fmt: skip
        return found

    # ---- the package's own operators

    def _ours(self, case: Case, entry: dict[str, Any]) -> None:
        plan = dispatch.resolve(case.shape.problem, self.device)
        entry["configs"] = {
            name: {"config": r.config, "grade": r.grade, "reason": r.reason} for name, r in plan.items()
        }
        i = self._inputs(case)
        self._check(case, i, plan.configs, entry)
        self._stages(case, i, plan.configs, entry)
        self.machine.free()
        self._totals(i, entry)
        entry["tflops"] = tflops(case, entry)
        entry["index_share"] = share(entry)

    def _inputs(self, case: Case) -> Inputs:
        self.machine.free()
        recorded = self.settings.recorded
        return inputs.make(case, self.settings.seed, self.machine.device, dict(recorded) if recorded else None)

    def _check(self, case: Case, i: Inputs, configs: Mapping[str, Any], entry: dict[str, Any]) -> None:
        s = self.settings
        small = check.at_reduced_length(case.shape.problem, configs, self.machine.device, s.seed)
        full = check.at_length(i, case.shape.dtype, s.seed, s.backward)
        entry["check"] = {"reduced": small.as_dict(), "sampled": full.as_dict()}
        reasons = [f"{name} length: {v.reason}" for name, v in (("reduced", small), ("timed", full)) if v.reason]
        if reasons:
            raise CheckFailed("; ".join(reasons))

    def _stages(self, case: Case, i: Inputs, configs: Mapping[str, Any], entry: dict[str, Any]) -> None:
        made = ours.stages(i, configs)
        names = STAGES if self.settings.backward else STAGES[:3]
        entry["stages"] = {name: self._time(made.run[name]) for name in names}
        entry["index"] = self._time(made.find)
        entry["sort"] = self._time(lambda: torch.sort(i.scores, dim=-1))
        entry["index_bytes_per_token"] = ours.index_bytes(made.index) / (case.shape.b * case.shape.n)

    def _totals(self, i: Inputs, entry: dict[str, Any]) -> None:
        forward, machine = ours.forward(i), self.machine
        totals, memory = entry.setdefault("totals", {}), entry.setdefault("memory", {})
        totals["forward"] = self._time(forward)
        memory["forward"] = machine.peak(forward)
        host = {"forward": machine.host(forward, IN_A_ROW), "forward_after_idle": machine.host(forward, 1)}
        if self.settings.backward:
            both = ours.forward_backward(i)
            totals["forward_backward"] = self._time(both)
            memory["forward_backward"] = machine.peak(both)
            host["forward_with_grad"] = machine.host(ours.forward_with_grad(i), IN_A_ROW)
        entry["host_us"] = {name: e._asdict() for name, e in host.items()}
        try:
            totals["forward_graph"] = self._time(machine.graph(forward))
        except Exception as error:
            entry["graph_failed"] = _words(error)
            self.note(f"  no CUDA graph: {_words(error)}")
        machine.free()

    def _time(self, run: Run) -> dict[str, Any]:
        return _dict(self.machine.time(run, self.settings.seconds))

    def _guard(self, entry: dict[str, Any], work: Run) -> None:
        """Do the work of one case; what it raises becomes the entry's ``error``."""
        if self._lost:
            entry["error"] = self._lost
            return
        try:
            work()
        except Exception as error:
            entry["error"] = _words(error)
            entry["failed_check"] = isinstance(error, CheckFailed)
            self.note(f"  failed: {_words(error)}")
        self._recover("the operators")

    def _recover(self, who: str) -> None:
        """Free what a failure left; notice where the device is lost for this process."""
        if self._lost is None and not self.machine.alive():
            self._lost = f"not tried: the GPU answers no more since {who} failed"
            self.note(f"  {self._lost}")
        if self._lost is None:
            self.machine.free()

    # ---- peers

    def _peers(self, case: Case, entry: dict[str, Any], peers: Sequence[Peer]) -> None:
        i: Inputs | None = None
        for peer in peers:
            known = self._known.get(peer.key(case))
            if self._lost:
                entry["peers"][peer.name] = {"failed": self._lost}
                continue
            if known:
                row: dict[str, Any] = {**known[1], "measured_with": known[0]}
            else:
                row = {}
                try:
                    i = self._inputs(case) if i is None else i
                    self._peer(peer, i, row)
                except Exception as error:
                    row["skipped" if isinstance(error, Unfit) else "failed"] = _words(error)
                self._known[peer.key(case)] = str(case), row
                self._recover(f"{peer.name}")
            entry["peers"][peer.name] = {**row, "ratio": ratios(entry, row)}
            why = row.get("failed") or row.get("skipped")
            if why:
                self.note(f"  {peer.name}: {why}")

    def _peer(self, peer: Peer, i: Inputs, row: dict[str, Any]) -> None:
        n = i.scores.shape[-1]
        if peer.quadratic and n >= DENSE_PROBE * 1024:
            part = ready(peer, inputs.shorter(i, n // DENSE_PROBE))
            self._affordable(self.machine.once(part.both if self.settings.backward else part.forward) * DENSE_PROBE**2)
            del part
        made = ready(peer, i)
        if peer.exact:
            row["error"] = self._exact(made, i)
        self._affordable(self.machine.once(made.forward))
        row["forward"] = self._time(made.forward)
        if self.settings.backward:
            self._affordable(self.machine.once(made.both))
            row["forward_backward"] = self._time(made.both)

    def _affordable(self, seconds: float) -> None:
        if seconds > self.settings.peer_limit:
            raise Unfit(f"one call takes about {seconds:.1f} s, more than --peer-limit {self.settings.peer_limit:g}")

    def _exact(self, made: Ready, i: Inputs) -> float:
        """The relative error of a peer that computes SparseK with gate "none", at a sample of queries."""
        at = sample.sample_queries(i.scores.shape[-1], self.settings.seed)
        want = sample.expected_queries(i._replace(gate="none"), at)["out"]
        error = relative_error(made.forward().reshape(i.query.shape)[:, :, at].double(), want)
        dtype = next(name for name, x in inputs.DTYPES.items() if x == i.query.dtype)
        if not error <= 2 * TOLERANCE[dtype]:
            raise RuntimeError(f"its result is wrong: relative error {error:.2e}")
        return error


def tflops(case: Case, entry: Mapping[str, Any]) -> dict[str, float]:
    """TFLOP/s on attended pairs: of the attention kernel, of the backward kernels together, of the totals."""
    flops = forward_flops(case.shape)
    stages, totals = entry["stages"], entry["totals"]
    parts = {"kernel_forward": (1.0, [stages["forward"]]), "forward": (1.0, [totals["forward"]])}
    if "dkv" in stages:
        parts["kernel_backward"] = BACKWARD_FLOPS, [stages["dq"], stages["dkv"]]
        parts["forward_backward"] = 1 + BACKWARD_FLOPS, [totals["forward_backward"]]
    return {name: x * flops / sum(t["median"] for t in times) / 1e9 for name, (x, times) in parts.items()}


def share(entry: Mapping[str, Any]) -> float:
    """What part of the total forward time finding out which keys are read takes: threshold, then schedule. Less than
    the sum of the two stages, each of which is timed with nothing in the caches."""
    return entry["index"]["median"] / entry["totals"]["forward"]["median"]


def ratios(entry: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """A peer's times over ours: above 1 where ours is faster."""
    totals = entry.get("totals", {})
    return {name: row[name]["median"] / totals[name]["median"] for name in totals if name in row}


def _dict(e: Estimate) -> dict[str, Any]:
    return e._asdict()


def _words(error: Exception) -> str:
    """One line: the kind, unless it is one of this package's, and the first line of the message."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, Unfit | CheckFailed) else f"{type(error).__name__}: {text}"[:300]
