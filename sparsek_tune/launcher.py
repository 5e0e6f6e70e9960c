"""Kernel launches past most of Triton's own Python.

A launch by Triton spends tens of microseconds on every launch, much of it in the driver, which is asked about every
pointer. A kernel that was compiled once is launched here by its C function, with addresses in place of tensors. Triton
itself still specialises the arguments, so that the kernel launched is always the one that Triton would launch.

The ordinary way is taken for what was not compiled yet, whenever anything observes or changes launches (profilers'
hooks, debugging, instrumentation), and with a version of Triton whose internals are not known here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

KNOWN = ("3.6", "3.7", "3.8", "3.9")  # whose C launchers are called as below

_known = ".".join(triton.__version__.split(".")[:2]) in KNOWN
_run = JITFunction.run  # replaced by whoever wants to see every launch
_bound: dict[Any, Bound | None] = {}
_local = threading.local()


class Bound(NamedTuple):
    """A compiled kernel's C function and what it takes between the stream and the arguments. nested: whether it takes
    the arguments as one tuple; compiled: kept alive, because a kernel that is collected unloads its module."""

    launch: Callable[..., None]
    head: tuple[Any, ...]
    nested: bool
    compiled: Any

    def __call__(self, grid: Sequence[int], stream: int, args: tuple[Any, ...]) -> None:
        args = (args,) if self.nested else args
        self.launch(*three(grid), stream, *self.head, *args)


class Launch(NamedTuple):
    """One launch as it happened: kernel, its compiled form, grid, and all of its parameters in order."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]


def three(grid: Sequence[int]) -> tuple[int, int, int]:
    """The grid with its missing axes."""
    return (*grid, 1, 1, 1)[:3]  # type: ignore[return-value]


def observed() -> bool:
    """Whether every launch must take the ordinary way."""
    r = knobs.runtime
    return bool(
        not _known
        or JITFunction.run is not _run
        or _active(r.launch_enter_hook)
        or _active(r.launch_exit_hook)
        or r.debug
        or r.add_stages_inspection_hook is not None
        or knobs.compilation.instrumentation_mode
    )


def _active(hook: Any) -> bool:
    """A chain of hooks is always there, and empty where nobody looks."""
    return hook is not None and bool(getattr(hook, "calls", True))


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Launch the kernel on the current device and stream."""
    record = getattr(_local, "record", None)
    if record is None and not observed() and isinstance(kernel, JITFunction) and not kernel.pre_run_hooks:
        _launch(kernel, grid, args, meta)
        return
    compiled = _ordinary(kernel, grid, args, meta)
    if record is not None:
        record(Launch(kernel, compiled, grid, _parameters(kernel, args, meta)))


@functools.cache
def hash_kernels() -> None:
    """Have Triton hash every kernel, in one order, before the first is compiled.

    Its hash of a kernel counts the globals that a called function reads only if that function has been hashed before
    (Triton 3.6 to 3.7, ``DependenciesFinder._update_hash``): by which kernel came first, one process would not find in
    Triton's cache what another has compiled.
    """
    modules = sorted(name for name in list(sys.modules) if name.startswith(f"{__package__}.kernel_templates."))
    for kernel in (kernel for name in modules for _, kernel in sorted(vars(sys.modules[name]).items())):
        if isinstance(kernel, JITFunction):
            _ = kernel.cache_key


def _ordinary(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
    hash_kernels()
    # Stated, because Triton 3.10 changes the default.
    return kernel[grid](*args, enable_fp_fusion=True, **meta)


def _launch(kernel: JITFunction, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    active: Any = driver.active
    device = active.get_current_device()
    params, specialization, options = kernel.device_caches[device][-1](*args, **meta)
    # The values of constants are in the specialisation, as in Triton's own key.
    key = id(kernel), device, tuple(specialization), tuple(options.items())
    bound = _bound.get(key)
    if bound is None:
        compiled = _ordinary(kernel, grid, args, meta)
        _bound[key] = bind(compiled)
    else:
        addresses = tuple([x.data_ptr() if isinstance(x, Tensor) else x for x in params.values()])
        bound(grid, active.get_current_stream(device), addresses)


def _parameters(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments in the order of the kernel's parameters."""
    return *args, *(meta[name] for name in kernel.arg_names[len(args) :])


def bind(compiled: Any) -> Bound | None:
    """The C function of a compiled kernel; None where it takes more than is passed here: scratch memory, descriptors,
    instrumentation."""
    from triton.backends.nvidia.driver import CudaLauncher

    if compiled is None or not hasattr(compiled, "packed_metadata"):
        return None
    launcher = compiled.run
    if type(launcher) is not CudaLauncher or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    if getattr(launcher, "gsan_enabled", False) or getattr(compiled.metadata, "tensordesc_meta", None):
        return None
    start = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    if hasattr(launcher, "kernel_signature"):  # since 3.7; no hooks, no scratch
        after = compiled.packed_metadata, *(None,) * 5, launcher.arg_annotations, launcher.kernel_signature
        return Bound(launcher.launch, start + after, True, compiled)
    return Bound(launcher.launch, (*start, None, None, compiled.packed_metadata, None, None, None), False, compiled)


@contextlib.contextmanager
def recording(record: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block this thread's launches take the ordinary way, and ``record`` is called after each."""
    _local.record = record
    try:
        yield
    finally:
        _local.record = None
