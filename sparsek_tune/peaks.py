"""What GPUs can do at most: the roofs over a cost model."""

from __future__ import annotations

from typing import NamedTuple

from sparsek_tune.problem import Device


class Peak(NamedTuple):
    """flops: dense 16-bit tensor-core operations with 32-bit sums (1/s); bandwidth: of device memory (B/s)."""

    flops: float
    bandwidth: float

    def of(self, dtype: str) -> Peak:
        """The same for problems of ``dtype``: IEEE dots of fp32 run outside the tensor cores, at about 1/16."""
        return self._replace(flops=self.flops / 16) if dtype == "fp32" else self


# By compute capability and by the name that CUDA gives, from vendor data sheets. Of the GPUs of one capability the
# first is the one that problem.target_device names.
_PEAKS = {
    80: {"NVIDIA A100-SXM4-80GB": Peak(312e12, 2.0e12)},
    # GeForce sums in 32 bits at half the rate of its sums in 16: 82 SMs * 4 * 128 * 2 * 1.695 GHz / 2.
    86: {"NVIDIA A40": Peak(149.7e12, 0.696e12), "NVIDIA GeForce RTX 3090": Peak(71e12, 0.936e12)},
    89: {"NVIDIA L4": Peak(121e12, 0.30e12)},
    90: {"NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12), "NVIDIA H200": Peak(989e12, 4.8e12)},
    100: {"NVIDIA B200": Peak(2250e12, 8.0e12)},
    120: {"NVIDIA GeForce RTX 5090": Peak(210e12, 1.79e12)},
}
KNOWN = tuple(name for named in _PEAKS.values() for name in named)


def target_peak(cc: int) -> Peak:
    """The peak of the GPU that the target of a compute capability (times ten) names. Raises KeyError."""
    return next(iter(_PEAKS[cc].values()))


def peak(device: Device) -> Peak | None:
    """The peak of exactly this GPU model, None where it is not known: others of its capability may be far from it."""
    return _PEAKS.get(device.cc, {}).get(device.name)
