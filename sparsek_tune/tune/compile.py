"""What compiles candidates: GPU-blind processes, one kernel at a time, and what cubins say of their resources.

A candidate's launch function runs on meta tensors; Triton compiles exactly what the launch will ask for and leaves it
in its on-disk cache, from where the measuring process loads it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Device
from sparsek_tune.tune.cubin import REGISTERS, resources
from sparsek_tune.tune.stage import StageCache
from sparsek_tune.tune.types import Kernel, Part, Spec

_NICE = 10  # the measuring process, which has little to do on the CPU, goes first


class CompileService:
    """Runs in a worker process: compiles candidates for the device that each spec names."""

    def __init__(self, factory: str) -> None:
        os.nice(_NICE)
        self._stages = StageCache(factory, "compile")
        self._asked: tuple[Spec, Config, Part] | None = None
        self._kernels: Mapping[str, Callable[[], Kernel]] = {}

    def kernels(self, spec: Spec, config: Config, part: Part) -> list[str]:
        """Keys of the kernels of a candidate, as they are in all processes."""
        if self._asked != (spec, config, part):
            self._asked = None
            use_target(spec.device)
            self._kernels = self._stages.get(spec).kernels(config, part)
            self._asked = (spec, config, part)
        return list(self._kernels)

    def compile(self, spec: Spec, config: Config, part: Part, number: int) -> Kernel:
        """Compile one of them, and leave it in Triton's cache."""
        key = self.kernels(spec, config, part)[number]
        return self._kernels[key]()


@contextmanager
def later() -> Iterator[None]:
    """Kernels that are warmed up within the block are compiled only when their ``result()`` is asked for."""
    from triton.runtime import _async_compile

    token = _async_compile.active_mode.set(_Listing())  # type: ignore[arg-type]
    try:
        yield
    finally:
        _async_compile.active_mode.reset(token)


class _Listing:
    """Stands where Triton expects its AsyncCompileMode, which would compile at once, by threads."""

    @staticmethod
    def submit(key: str, compile: Callable[[], Any], finalize: Callable[[Any], None]) -> Any:
        from triton.runtime._async_compile import FutureKernel

        return FutureKernel(finalize, _Later(key, compile))  # type: ignore[arg-type]


class _Later(NamedTuple):
    """As much of a Future as Triton needs. key: of the kernel in Triton's cache."""

    key: str
    compile: Callable[[], Any]

    def result(self) -> Any:
        return _with_launcher(self.compile())


def _with_launcher(compiled: Any) -> Any:
    """Up to 3.6, Triton has gcc compile a C function for every signature that is launched the first time: the time of
    the measuring process, unless the function lies in the cache already. Where this fails, that process will say so."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with suppress(Exception):
            driver.CudaLauncher(compiled.src, compiled.metadata)
    return compiled


def kernels_of(launched: Sequence[Any]) -> dict[str, Callable[[], Kernel]]:
    """By key, what compiles each of Triton's kernels where :func:`later` has put that off, and tells its resources."""
    return {_hash(kernel): partial(_resources, kernel) for kernel in launched}


def _hash(kernel: Any) -> str:
    """Triton's, of a CompiledKernel or of what is still to be one."""
    future = vars(kernel).get("future")
    return kernel.hash if future is None else hashlib.sha256(future.key.encode()).hexdigest()


def _resources(kernel: Any) -> Kernel:
    compiled = kernel.result() if "future" in vars(kernel) else kernel
    r = resources(compiled.asm["cubin"])
    m = compiled.metadata
    return Kernel(m.name, r.registers, r.stack, m.shared, m.num_warps)


def use_target(device: Device) -> None:
    """Make Triton compile for ``device`` in this process, with or without a GPU in it; nothing can be launched then."""
    from triton.runtime import driver

    if getattr(driver, "sparsek_target", None) != device:
        driver.set_active(_CompileOnlyDriver(device))  # type: ignore[arg-type]
        driver.sparsek_target = device  # type: ignore[attr-defined]


class _CompileOnlyDriver:
    """What Triton asks of a driver while it compiles."""

    def __init__(self, device: Device) -> None:
        from triton.backends.compiler import GPUTarget

        self._device = device
        self._target = GPUTarget(device.kind, device.cc, 32)
        self.utils = self

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict[str, int]:
        d = self._device
        sm = {"multiprocessor_count": d.sm_count, "warpSize": 32, "max_num_regs": REGISTERS}
        return {"max_shared_mem": d.smem, **sm}

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def unload_module(self, module: Any) -> None:
        pass

    def load_binary(self, *_: Any) -> Any:
        raise RuntimeError("this process compiles only: no kernel can be loaded")

    def launcher_cls(self, *_: Any) -> Any:
        raise RuntimeError("this process compiles only: no kernel can be launched")
