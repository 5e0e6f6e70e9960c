"""The parent's side of compiling: candidates go in, their kernels are spread over GPU-blind processes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from queue import PriorityQueue
from threading import RLock, Thread
from typing import Any, NamedTuple

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune.channel import Worker, WorkerDied, WorkerError
from sparsek_tune.tune.cubin import infeasible
from sparsek_tune.tune.forkserver import ForkServer
from sparsek_tune.tune.types import Kernel, Part, Spec

_PREPARE_TIMEOUT = 300.0  # seconds to set a stage up and list the kernels of a candidate
_EARLY = 1 << 40  # what is submitted early comes after so many others
_BYTES_PER_COMPILE = 1 << 30  # memory that one compile may take


class Compiled(NamedTuple):
    """The outcome for one candidate: status "ok", "infeasible", "compile" or "timeout"; the reason where not ok; the
    seconds that its slowest kernel took, which is what a candidate takes where no process is busy."""

    status: str
    reason: str
    kernels: tuple[Kernel, ...] = ()
    seconds: float = 0.0


class _Job:
    """A candidate on its way."""

    def __init__(self, number: int, spec: Spec, config: Config, part: Part) -> None:
        self.number, self.spec, self.part = number, spec, part
        self.asked = (spec, config, part)
        self.future: Future[Compiled] = Future()
        self.kernels: list[_Kernel] = []
        self.begun = False  # to be listed
        self.told = False  # that it is cancelled, who waits for it

    def cancel(self) -> None:
        """The end, also for who waits for it in a ``concurrent.futures.wait``."""
        if self.future.cancel() and not self.told:
            self.told = True
            self.future.set_running_or_notify_cancel()

    def settle(self) -> None:
        """The end, where all its kernels are done."""
        if error := next((k.error for k in self.kernels if k.error is not None), None):
            self.fail(error)
        elif all(k.compiled for k in self.kernels):
            kernels = tuple(k.compiled for k in self.kernels if k.compiled)
            reason = infeasible(kernels, self.spec.device) if self.part == "length" else None
            self._end("infeasible" if reason else "ok", reason or "", kernels)

    def fail(self, error: BaseException) -> None:
        """As ``settle``; what is no WorkerError is raised by the future."""
        if isinstance(error, WorkerError):
            self._end("compile" if error.status == "runtime" else error.status, str(error))
        elif self._claim():
            self.future.set_exception(error)

    def _end(self, status: str, reason: str, kernels: tuple[Kernel, ...] = ()) -> None:
        if self._claim():
            seconds = max((k.seconds for k in self.kernels), default=0.0)
            self.future.set_result(Compiled(status, reason, kernels, seconds))

    def _claim(self) -> bool:
        if self.future.done():
            return False
        self.told = not self.future.set_running_or_notify_cancel()
        return not self.told


class _Kernel:
    """A kernel, and the candidates that wait for it. compiled or error, and seconds: once it is done."""

    def __init__(self, key: str) -> None:
        self.key, self.begun = key, False
        self.jobs: list[_Job] = []
        self.compiled: Kernel | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0


class CompilePool:
    """Processes that compile candidates; ``submit`` gives a Future of a Compiled, which raises nothing but MachineError
    and can be cancelled until it is done.

    The kernels of a candidate are compiled by several processes at once, one that several candidates have is compiled
    once, and who was submitted earlier goes first. factory: "module:function" of the stages; timeout: seconds for one
    kernel; server: forks the processes.
    """

    def __init__(
        self, factory: str, jobs: int | None = None, timeout: float = 60.0, server: ForkServer | None = None
    ) -> None:
        self.jobs = jobs or default_jobs()
        self._timeout = timeout
        # GPU-blind: a compile must never create a CUDA context, and meta tensors need none.
        env = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
        service = "sparsek_tune.tune.compile:CompileService"
        self._workers = [Worker(service, factory, env=env, server=server) for _ in range(self.jobs)]
        self._threads = [Thread(target=self._serve, args=(w,), name="compile", daemon=True) for w in self._workers]
        self._tasks: PriorityQueue[tuple[int, int, Callable[[Worker], None] | None]] = PriorityQueue()
        self._count = itertools.count()
        self._lock = RLock()  # of all below, and of the jobs
        self._jobs: dict[Any, _Job] = {}
        self._kernels: dict[str, _Kernel] = {}
        self._closed = False
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes, each of which otherwise starts when it is needed; does not wait for them."""
        for worker in self._workers:
            worker.start()

    def submit(self, spec: Spec, config: Config, part: Part = "length", *, early: bool = False) -> Future[Compiled]:
        """part: what of it, see ``Stage.compile``. What was submitted before and not cancelled is not done again.
        early: nobody waits for it yet; all else goes first, until it is submitted once more."""
        key = (spec._replace(companions=tuple(sorted(spec.companions.items()))), config, part)  # type: ignore
        number = next(self._count) + (_EARLY if early else 0)
        with self._lock:
            job = self._jobs.get(key)
            if job is None or job.future.cancelled():
                job = self._jobs[key] = _Job(number, spec, config, part)
                if self._closed:
                    job.cancel()
                self._put(job, partial(self._list, job))
            elif job.number > number:
                job.number = number
                self._put(job, partial(self._list, job))
                self._put_kernels(job)
        return job.future

    def close(self) -> None:
        """Kill the processes; futures that are not done are cancelled."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                job.cancel()
            for _ in self._threads:
                self._tasks.put((-1, next(self._count), None))
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()

    def _put(self, job: _Job, task: Callable[[Worker], None]) -> None:
        self._tasks.put((job.number, next(self._count), task))

    def _serve(self, worker: Worker) -> None:
        while (task := self._tasks.get()[2]) is not None:
            task(worker)

    def _list(self, job: _Job, worker: Worker) -> None:
        """Have compiled what of a candidate is not compiled yet."""
        with self._lock:
            if job.begun or job.future.done():
                return
            job.begun = True
        try:
            keys = worker.call("kernels", *job.asked, timeout=_PREPARE_TIMEOUT)
        except BaseException as error:
            with self._lock:
                job.fail(error)
            return
        with self._lock:
            for key in keys:
                kernel = self._kernels.setdefault(key, _Kernel(key))
                kernel.jobs.append(job)
                job.kernels.append(kernel)
            self._put_kernels(job)
            job.settle()

    def _put_kernels(self, job: _Job) -> None:
        """Have the kernels of ``job`` compiled when it is its turn, if none that shares them comes before."""
        for kernel in job.kernels:
            if not kernel.begun:
                self._put(job, partial(self._compile, kernel))

    def _compile(self, kernel: _Kernel, worker: Worker) -> None:
        """Compile a kernel, unless that was done or nobody waits for it any more."""
        with self._lock:
            lead = next((job for job in kernel.jobs if not job.future.done()), None)
            if kernel.begun or lead is None:
                if not kernel.begun and self._kernels.get(kernel.key) is kernel:
                    del self._kernels[kernel.key]
                return
            kernel.begun = True
        compiled, error, began = None, None, time.monotonic()
        try:
            number = lead.kernels.index(kernel)
            call = partial(worker.call, "compile", *lead.asked, number, timeout=self._timeout)
            try:
                compiled = call()
            except WorkerDied:  # perhaps not by its own fault, such as memory that others had taken
                compiled = call()
        except BaseException as e:
            error = e
        with self._lock:
            kernel.compiled, kernel.error, kernel.seconds = compiled, error, time.monotonic() - began
            for job in kernel.jobs:
                job.settle()


def settled(parts: Iterable[Future[Compiled]]) -> Compiled:
    """Of the parts of a candidate the first that is not ok, if there is one, when all are done."""
    done = [future.result() for future in parts]
    return next((compiled for compiled in done if compiled.status != "ok"), done[0])


def default_jobs(pools: int = 1) -> int:
    """For each of so many pools: one process per CPU that we may use, as far as memory goes, at most 16."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        memory = 8 << 30
    return max(1, min(min(cpus, memory // _BYTES_PER_COMPILE) // pools, 16))
