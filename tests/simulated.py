"""Records as a tuner would have made them, by a made-up but smooth law of times: for tests and for looking at pages."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sparsek_tune.db.schema import STATUSES
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.peaks import target_peak
from sparsek_tune.problem import Problem, target_device

H100 = replace(target_device("cuda:90"), name="NVIDIA H100 80GB HBM3", driver="570.1", cuda="12.8", memory=80 << 30)
A100 = replace(target_device("cuda:80"), name="NVIDIA A100-SXM4-80GB", driver="570.1", cuda="12.8", memory=80 << 30)
SHORT = Problem.of("bf16", 128, 4, "kv", 512, 512, 4096, 8)
LONG = Problem.of("bf16", 128, 4, "kv", 1024, 512, 65536, 8)
REASONS = {
    "infeasible": "a thread spills {} bytes",
    "compile": "OutOfResources: shared memory, required: {}, hardware limit: 232448",
    "timeout": "no answer within 60 s",
    "runtime": "CUDA error: an illegal memory access was encountered at 0x{}",
    "wrong": "normal scores, n=512: out differs by 0.{} where 0.02 is allowed",
}
assert set(REASONS) < set(STATUSES)


def simulate(problems=(SHORT, LONG), devices=(H100, A100), trials=80, seed=0, templates=TEMPLATES):
    """Records of a whole tuning: for every device, problem and template ``trials`` configs and a race."""
    clock = datetime(2025, 1, 1, tzinfo=UTC)
    records = []
    for device in devices:
        for problem in problems:
            for template in templates.values():
                maker = _Maker(device, problem, template, seed, clock)
                maker.search(trials)
                records += maker.records
                clock = maker.clock
    return records


class _Maker:
    def __init__(self, device, problem, template, seed, clock):
        self.device, self.problem, self.template, self.clock = device, problem, template, clock
        self.rng = random.Random(zlib.crc32(f"{seed} {device.name} {problem} {template.name}".encode()))
        self.records = []

    def search(self, trials):
        default = self.template.default(self.problem, self.device)
        times = {}
        for config in [default, *self._configs(trials - 1)]:
            if config in times:
                continue
            status = "ok" if config == default else self._status(config)
            times[config] = self._ms(config) if status == "ok" else None
            self._add(config, status, times[config])
        timed = sorted((c for c in times if times[c] and c != default), key=lambda c: times[c])[:5]
        race = {c: self._ms(c) for c in (default, *timed)}
        best = min(race, key=lambda c: race[c])
        for config, ms in race.items():
            won = {"default_ms": race[default], "tuned_ms": ms} if config == best else None
            self._add(config, "ok", ms, {"phase": "race", "contenders": len(race)}, won)

    def _configs(self, count):
        found = list(self.template.feasible(self.problem, self.device))
        return self.rng.sample(found, min(count, len(found)))

    def _status(self, config):
        tile = config.get("BM", 0) * config.get("BN", 0)
        if tile >= 128 * 128 and self.rng.random() < 0.8:
            return "infeasible"
        return self.rng.choices(["ok", "compile", "runtime", "wrong", "timeout"], [95, 2, 1, 1, 1])[0]

    def _ms(self, config):
        """The cost model's, times what each parameter's distance from a best place adds, and 1 % of noise."""
        costs = [self.template.cost(config, self.problem)]
        if self.template.name == "schedule":  # timed with its consumers
            others = (TEMPLATES[name] for name in ("forward", "dq", "dkv"))
            costs += [t.cost(t.default(self.problem, self.device), self.problem) for t in others]
        seconds = sum(c.seconds(*target_peak(self.device.cc)) for c in costs) * 1.6
        for i, param in enumerate(self.template.space):
            values = list(param.domain.values)
            seconds *= 1 + abs(values.index(config[param.name]) - len(values) // 2) * 0.25 / (1 + i) ** 1.5
        return seconds * 1e3 * self.rng.gauss(1, 0.01)

    def _add(self, config, status, ms, protocol=None, winner=None):
        self.clock += timedelta(seconds=1)
        at = self.clock.isoformat(timespec="microseconds")
        reason = REASONS.get(status, "").format(self.rng.randrange(16, 4096))
        run = {
            "command": "sparsek-tune run", "host": "simulated", "pid": 1, "outcome": "done",
            "started_at": "2025-01-01T00:00:00.000000+00:00", "finished_at": None,
        }  # fmt: skip
        races = [{**winner, "created_at": at, "known": []}] if winner else []
        self.records.append({
            "device": self.device.as_dict(),
            "template": {"name": self.template.name, "source_hash": self.template.source_hash, "space_version": "1"},
            "problem": self.problem.project(self.template.fields)._asdict(),
            "config": dict(config), "status": status, "reason": reason,
            "median_ms": ms, "ci_low_ms": ms and ms * 0.99, "ci_high_ms": ms and ms * 1.01, "samples": 50 if ms else 0,
            "protocol": protocol or {}, "created_at": at, "run": run, "races": races, "winner": winner,
        })  # fmt: skip
