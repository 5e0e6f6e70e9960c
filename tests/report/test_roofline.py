"""Points under the roof: FLOPs and bytes of the cost model over the race's times; no roof for a GPU that is unknown."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import simulated

from sparsek_tune import peaks
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.problem import target_device
from sparsek_tune.report import evidence, roofline


def placed(records, name, **changes):
    """What is placed of a kernel on the H100, with other fields in some parts of its records."""
    h100 = simulated.H100.as_dict()
    chosen = copy.deepcopy([r for r in records if r["template"]["name"] == name and r["device"] == h100])
    for record in chosen:
        for part, fields in changes.items():
            record[part].update(fields)
    (gpu,) = evidence.gpus(chosen)
    return roofline.place(gpu)


def test_peaks_are_of_a_model():
    assert peaks.peak(simulated.H100) == peaks.target_peak(90) == (989e12, 3.35e12)
    assert peaks.peak(replace(simulated.H100, name="NVIDIA H200")).bandwidth == 4.8e12
    assert peaks.peak(replace(simulated.H100, name="NVIDIA H100 PCIe")) is None
    assert peaks.peak(replace(simulated.H100, cc=80)) is None
    assert peaks.peak(target_device("cuda:90")) is None
    assert peaks.target_peak(90).of("fp32") == (989e12 / 16, 3.35e12)
    assert peaks.target_peak(90).of("bf16") == peaks.target_peak(90)


@pytest.mark.parametrize("name", ["threshold", "forward", "dq", "dkv"])
def test_a_point_is_the_cost_over_the_time(records, name):
    for p in placed(records, name):
        winner = p.search.winner
        for point, config, ms in (
            (p.default, p.search.default, winner.default_ms), (p.winner, winner.config, winner.tuned_ms)
        ):  # fmt: skip
            cost = TEMPLATES[name].cost(config, p.search.problem)
            assert point.flops == pytest.approx(cost.flops / (ms / 1e3))
            assert point.intensity == pytest.approx(cost.flops / cost.bytes)
            roof = min(989e12, point.intensity * 3.35e12)
            assert point.share == pytest.approx(point.flops / roof) and 0 < point.share < 1


def test_the_schedule_is_placed_with_what_is_timed_with_it(records):
    """Else the time of four kernels would stand over the work of one."""
    for p in placed(records, "schedule"):
        search, config = p.search, p.search.winner.config
        others = [TEMPLATES[name] for name in ("forward", "dq", "dkv")]
        costs = [t.cost(t.default(search.problem, search.device), search.problem) for t in others]
        costs.append(TEMPLATES["schedule"].cost(config, search.problem))
        assert roofline.cost(search, config).flops == pytest.approx(sum(c.flops for c in costs))
        assert roofline.cost(search, config).bytes == pytest.approx(sum(c.bytes for c in costs))


def test_fp32_has_a_lower_roof(records):
    usual, full = placed(records, "dq"), placed(records, "dq", problem={"dtype": "fp32"})
    assert full and full[0].winner.share > 4 * usual[0].winner.share * full[0].winner.flops / usual[0].winner.flops


def test_a_gpu_that_is_not_known_has_no_roof(records):
    found = placed(records, "forward")
    unknown = placed(records, "forward", device={"name": "NVIDIA H800"})
    assert [p.winner.flops for p in unknown] == [p.winner.flops for p in found]
    assert all(p.winner.share is None for p in unknown)


@pytest.mark.parametrize(
    "changes",
    [{"template": {"name": "unknown"}}, {"config": {"BM": 3}}, {"problem": {"n": 0, "rows": 0}},
     {"problem": {"dtype": "x"}}, {"problem": {"d": 1 << 62, "n": 1 << 62, "k": 1 << 62, "rows": 1 << 62}}],
)  # fmt: skip
def test_what_the_cost_model_does_not_take_is_not_placed_or_finite(records, changes):
    for p in placed(records, "forward", **changes):
        for point in (p.default, p.winner):
            assert point is None or 0 < point.flops < float("inf")
    if "problem" not in changes or "dtype" in changes["problem"]:
        assert not any(p.winner for p in placed(records, "forward", **changes))
