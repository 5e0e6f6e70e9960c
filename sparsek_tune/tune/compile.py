"""Compiling candidates ahead of the GPU: a pool of GPU-blind processes, and what the cubins say about feasibility.

A candidate's launch function runs on meta tensors; Triton compiles exactly what the launch will ask for and leaves it
in its on-disk cache, from where the measuring process loads it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.problem import Device
from sparsek_tune.tune.channel import Worker, WorkerError
from sparsek_tune.tune.cubin import resources
from sparsek_tune.tune.stage import StageCache
from sparsek_tune.tune.types import Kernel, Spec

MOST_STACK = 512  # bytes a thread; a kernel that spills more has never been the fastest, and may take ptxas minutes
PREPARE_TIMEOUT = 300.0  # seconds for the kernels of all companions
_BYTES_PER_COMPILE = 1 << 30  # memory that one compile may take
_SIDE_BY_SIDE = 8  # kernels of one urgent candidate that a process compiles at once
_NICE = 10  # the measuring process, which has little to do on the CPU, goes first
_REGISTERS = 65536  # per SM, on every CUDA device since compute capability 3.5


class Compiled(NamedTuple):
    """The outcome for one candidate: status "ok", "infeasible", "compile" or "timeout"; the reason where not ok; the
    seconds that a process took."""

    status: str
    reason: str
    kernels: tuple[Kernel, ...] = ()
    seconds: float = 0.0


def infeasible(kernels: Sequence[Kernel], device: Device) -> str | None:
    """Why a candidate with these kernels is not worth a launch on ``device``, or None."""
    for k in kernels:
        if k.shared > device.smem:
            return f"{k.name}: shared memory of {k.shared} bytes, {device.smem} available"
        if k.stack > MOST_STACK:
            return f"{k.name}: spills, stack of {k.stack} bytes a thread, at most {MOST_STACK} accepted"
        if k.registers * 32 * k.warps > _REGISTERS:
            return f"{k.name}: {k.registers} registers a thread with {k.warps} warps, {_REGISTERS} an SM"
    return None


class CompilePool:
    """Processes that compile candidates; ``submit`` gives a Future of a Compiled, which holds no exception but
    MachineError and cancellation. factory: "module:function" of the stages; timeout: seconds for all kernels of one
    candidate."""

    def __init__(self, factory: str, jobs: int | None = None, timeout: float = 60.0) -> None:
        self.jobs = jobs or default_jobs()
        self._timeout = timeout
        # GPU-blind: a compile must never create a CUDA context, and meta tensors need none.
        env = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
        service = "sparsek_tune.tune.compile:CompileService"
        self._workers = [Worker(service, factory, env=env) for _ in range(self.jobs)]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self.jobs, thread_name_prefix="compile")

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes, each of which otherwise starts when it is needed; does not wait for them."""
        for worker in self._workers:
            worker.start()

    def submit(self, spec: Spec, config: Config, cases: bool = True) -> Future[Compiled]:
        """cases: also what verification on small problems launches (``Stage.compile``), in another process at the same
        time: for the few that all else waits for."""
        timed = self._threads.submit(self._compile, spec, config, False, cases)
        return _both(timed, self._threads.submit(self._compile, spec, config, True, True)) if cases else timed

    def close(self) -> None:
        """Kill the processes; unfinished futures end as timeouts or are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True)

    def _compile(self, spec: Spec, config: Config, cases: bool, urgent: bool) -> Compiled:
        worker, began = self._idle.get(), time.monotonic()
        try:
            worker.call("prepare", spec, timeout=PREPARE_TIMEOUT)  # a no-op from the second candidate on
            began = time.monotonic()
            kernels = tuple(worker.call("compile", spec, config, cases, urgent, timeout=self._timeout))
        except WorkerError as error:
            status = "compile" if error.status == "runtime" else error.status
            return Compiled(status, str(error), seconds=time.monotonic() - began)
        finally:
            self._idle.put(worker)
        reason = None if cases else infeasible(kernels, spec.device)
        return Compiled("infeasible" if reason else "ok", reason or "", kernels, time.monotonic() - began)


def _both(timed: Future[Compiled], cases: Future[Compiled]) -> Future[Compiled]:
    """Of two halves of a candidate the one that is not ok, if there is one."""
    both: Future[Compiled] = Future()

    def settle(_: Future[Compiled]) -> None:
        try:
            first, second = timed.result(), cases.result()
            both.set_result(second if first.status == "ok" != second.status else first)
        except BaseException as error:  # whatever it is, it belongs to who asks for the result
            both.set_exception(error)

    timed.add_done_callback(lambda _: cases.add_done_callback(settle))
    return both


def default_jobs(pools: int = 1) -> int:
    """For each of so many pools: one process per CPU that we may use, as far as memory goes, at most 16."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        memory = 8 << 30
    return max(1, min(min(cpus, memory // _BYTES_PER_COMPILE) // pools, 16))


class CompileService:
    """Runs in a worker process: compiles candidates for the device that each spec names."""

    def __init__(self, factory: str) -> None:
        os.nice(_NICE)
        self._stages = StageCache(factory, "compile")

    def prepare(self, spec: Spec) -> None:
        use_target(spec.device)
        self._stages.get(spec)

    def compile(self, spec: Spec, config: Config, cases: bool, urgent: bool) -> list[Kernel]:
        use_target(spec.device)
        stage = self._stages.get(spec)
        with side_by_side() if urgent else nullcontext():
            return stage.compile(config, cases)


@contextmanager
def side_by_side() -> Iterator[None]:
    """Kernels that are warmed up within the block are compiled by threads, and are all done at its end; an error shows
    when the kernel is used (:func:`kernels_of`)."""
    from triton.runtime._async_compile import AsyncCompileMode

    with _Compilers(_SIDE_BY_SIDE) as threads, AsyncCompileMode(threads, ignore_errors=True):
        yield


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, and what launches them."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(lambda: _with_launcher(fn(*args, **kwargs)))


def _with_launcher(compiled: Any) -> Any:
    """Up to 3.6, Triton has gcc compile a C function for every signature that is launched the first time: the time of
    the measuring process, unless the function lies in the cache already. Where this fails, that process will say so."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with suppress(Exception):
            driver.CudaLauncher(compiled.src, compiled.metadata)
    return compiled


def kernels_of(compiled: Sequence[Any]) -> list[Kernel]:
    """The resources of Triton's CompiledKernel objects, or of those that threads compiled (:func:`side_by_side`)."""
    found = []
    for c in compiled:
        c = c.result() if hasattr(c, "result") else c
        r = resources(c.asm["cubin"])
        found.append(Kernel(c.metadata.name, r.registers, r.stack, c.metadata.shared, c.metadata.num_warps))
    return found


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
        sm = {"multiprocessor_count": d.sm_count, "warpSize": 32, "max_num_regs": _REGISTERS}
        return {"max_shared_mem": d.smem, **sm}

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def unload_module(self, module: Any) -> None:
        pass

    def load_binary(self, *_: Any) -> Any:
        raise RuntimeError("this process compiles only: no kernel can be loaded")

    def launcher_cls(self, *_: Any) -> Any:
        raise RuntimeError("this process compiles only: no kernel can be launched")
