"""What the measuring process does: verify a candidate, time it, race finalists. Its parent may kill it at any time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.tune.channel import MachineError, Worker, WorkerError
from sparsek_tune.tune.forkserver import ForkServer
from sparsek_tune.tune.measure import Estimate, measure, race
from sparsek_tune.tune.stage import Stage, StageCache
from sparsek_tune.tune.types import Spec

PREPARE_TIMEOUT = 300.0  # seconds: inputs, companions, reference results


class BenchService:
    """Runs in a worker process. factory: "module:function" of the stages; mode: see ``stages.KernelStage``."""

    def __init__(self, factory: str, mode: str) -> None:
        self._stages = StageCache(factory, mode)

    def prepare(self, spec: Spec) -> None:
        self._stages.get(spec)

    def verify(self, spec: Spec, config: Config, cases: bool) -> str | None:
        with self._stage(spec) as stage:
            return stage.verify(config, cases)

    def verify_cases(self, spec: Spec, config: Config) -> str | None:
        stage = self._stages.beside(spec)
        try:
            return stage.verify_cases(config)
        finally:
            stage.check()
            self._stages.check()

    def measure(self, spec: Spec, config: Config, seconds: float, hopeless_ms: float) -> Estimate:
        with self._stage(spec) as stage:
            return measure(stage.sampler(config), seconds, hopeless_ms)

    def race(self, spec: Spec, configs: Sequence[Config], seconds: float, seed: int) -> list[Estimate]:
        with self._stage(spec) as stage:
            return race([stage.sampler(config) for config in configs], seconds, seed)

    @contextmanager
    def _stage(self, spec: Spec) -> Iterator[Stage]:
        """The stage; what candidates share must be the same at the end, however the block ends."""
        stage = self._stages.get(spec)
        try:
            yield stage
        finally:
            stage.check()


class Bench:
    """The parent's side of :class:`BenchService`, in one worker process. Every call may raise ``channel.WorkerError``,
    and the next one finds a fresh process where that was needed; or ``channel.MachineError``. mode: "measure" or
    "interpret". timeout: seconds to verify one candidate, and to time it on top of the sampling itself. server: forks
    the process."""

    def __init__(
        self, factory: str, mode: str = "measure", timeout: float = 60.0, server: ForkServer | None = None
    ) -> None:
        env = {"TRITON_INTERPRET": "0"}
        if mode == "interpret":  # which Triton decides when it is imported: not in a server's process
            env, server = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, None
        self._worker = Worker("sparsek_tune.tune.bench:BenchService", factory, mode, env=env, server=server)
        self._timeout = timeout
        self._ready: list[Spec] = []  # what could be set up

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process, which otherwise starts when there is something to do; does not wait for it."""
        self._worker.start()

    def close(self) -> None:
        self._worker.close()

    def prepare(self, spec: Spec) -> None:
        """Set the stage up; every other call does so too where it has to."""
        try:
            self._worker.call("prepare", spec, timeout=PREPARE_TIMEOUT)
        except WorkerError:
            if spec not in self._ready:  # its default config may be to blame, or a companion
                raise
            self._again(spec)
        if self._ready[-1:] != [spec]:
            self._ready.append(spec)

    def _again(self, spec: Spec) -> None:
        """What could be set up before, once more in a new process; no candidate is to blame where that fails."""
        self._worker.kill()
        try:
            self._worker.call("prepare", spec, timeout=PREPARE_TIMEOUT)
        except WorkerError as error:
            raise MachineError(f"{spec.template} could be measured before, and cannot any more: {error}") from error

    def verify(self, spec: Spec, config: Config, cases: bool = True) -> str | None:
        """Why the candidate's results are wrong, or None. cases: see ``Stage.verify``."""
        self.prepare(spec)
        return self._worker.call("verify", spec, config, cases, timeout=self._timeout)

    def verify_cases(self, spec: Spec, config: Config) -> str | None:
        """As ``verify``, on the small problems alone: another spec stays set up."""
        try:
            return self._worker.call("verify_cases", spec, config, timeout=self._timeout)
        except WorkerError:
            if self._ready:
                self._again(self._ready[-1])  # is the candidate to blame?
            raise

    def measure(self, spec: Spec, config: Config, seconds: float, hopeless_ms: float) -> Estimate:
        self.prepare(spec)
        return self._worker.call("measure", spec, config, seconds, hopeless_ms, timeout=self._timeout + seconds)

    def race(self, spec: Spec, configs: Sequence[Config], seconds: float, seed: int) -> list[Estimate]:
        self.prepare(spec)
        timeout = self._timeout + 10 * seconds
        return self._worker.call("race", spec, list(configs), seconds, seed, timeout=timeout)
