"""Templates and stages without kernels: every way in which a candidate can hurt its worker, and clean timings too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

from sparsek_tune.kernel_templates.base import Choice, Config, Cost, Param, Pow2, Template
from sparsek_tune.problem import Device, Problem
from sparsek_tune.tune.types import Kernel

PROBLEM = Problem.of("bf16", 64, 4, "kv", 64, 32, 1024, 8)
DEVICE = Device("cuda", 90, "fake GPU", 132, 232448, 50 << 20)
STATIC = Device("cuda", 90, "target cuda:90", 132, 232448, 50 << 20)
FACTORY = "faults:make"


FASTER = {"wrong": 100, "wrong in cases": 2, "kill in cases": 2}


class OutOfMemoryError(RuntimeError):
    """Stands for torch's."""


def template(name="fake", tiles=(16, 128), faults=("none",), fields=("n", "d"), check=None):
    """A template with a tile and, as its second parameter, what goes wrong. The default: tile 32, no fault."""
    return Template(
        name=name,
        fields=frozenset(fields),
        space=(Param("tile", Pow2(*tiles)), Param("fault", Choice(faults))),
        default=lambda problem, device: Config(tile=32, fault=faults[0]),
        check=check or (lambda config, problem, device: None),
        cost=lambda config, problem: Cost(1e12, 1e6 * config["tile"]),
        sources=(__file__,),
    )


def true_ms(config):
    """The time of a config without noise: tile 128 is best by far."""
    return 16.0 / config["tile"]


def log(line):
    """Note which process does what, for tests that look for it afterwards."""
    if path := os.environ.get("FAULTS_LOG"):
        with open(path, "a") as f:
            f.write(line + "\n")


def gate():
    """Wait until a test makes the file that FAULTS_GATE names."""
    while not os.path.exists(os.environ["FAULTS_GATE"]):
        time.sleep(0.01)


class Stage:
    def __init__(self, spec, mode):
        self.spec, self.mode = spec, mode

    def prepare(self):
        self._look()
        log(f"{self.mode} {self.spec.template} {os.getpid()}")

    def _look(self):
        lost = os.environ.get("FAULTS_LOST")
        if lost and os.path.exists(lost) and self.mode != "compile":
            raise RuntimeError("CUDA error: no CUDA-capable device is detected")

    def kernels(self, config, part):
        """One, or three of which all candidates have two."""
        slow = {"kernels": 0.2, "slow kernels": 0.5, "gated kernels": 0, "a kernel is killed once": 0}
        slow["a kernel hangs"] = 600
        seconds = slow.get(config["fault"])
        if part == "setup":
            return {}
        if seconds is None or part == "cases":
            return {f"{part} {self.spec} {config.key}": lambda: self._compile(config, part)}
        log(f"list of-{config['tile']}")
        keys = ("every", "all", f"of-{config['tile']}")
        return {key: lambda key=key: self._compile_one(key, config["fault"], seconds) for key in keys}

    def _compile_one(self, key, fault, seconds):
        log(f"kernel {key} {os.getpid()}")
        if fault == "a kernel is killed once" and key == "all":
            with open(os.environ["FAULTS_LOG"]) as f:
                if f.read().count("kernel all") == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
        if fault == "gated kernels" and key == "every":
            gate()
        time.sleep(seconds if seconds < 600 or key == "all" else 0)
        return Kernel(key, 64, 0, 1024, 4)

    def _compile(self, config, part):
        if config["fault"] == f"compile error of {part}":
            raise ValueError("no such instruction")
        if config["fault"] == f"gated {part}":
            gate()
        print("garbage of a compiler " * 1000)
        match "" if os.environ.get("FAULTS_HEALED") else config["fault"]:
            case "compile error":
                raise ValueError("no such instruction")
            case "compile hang":
                time.sleep(600)
            case "compile child" if config["tile"] == 8:  # one of all: with more, no compiler might be left
                child = subprocess.Popen(["sleep", "600"])  # as ptxas
                log(f"child fake {child.pid}")
                child.wait()
            case "sees":
                raise ValueError(f"CUDA {os.environ['CUDA_VISIBLE_DEVICES']!r} Triton {os.environ['TRITON_INTERPRET']}")
            case "compiler on a full disk":
                raise RuntimeError("ptxas fatal: write failed: No space left on device")
            case "compile crash":
                os.kill(os.getpid(), signal.SIGABRT)
            case "spills":
                return Kernel("k", 255, 4096, 1024, 4)
            case "shared memory":
                return Kernel("k", 128, 0, 1 << 20, 4)
        return Kernel("k", 64, 0, 1024, 4)

    def verify(self, config, cases=True):
        return (self._small(config) if cases else None) or self._at_length(config)

    def verify_cases(self, config):
        self._look()
        return self._small(config)

    def _small(self, config):
        if config["fault"] == "kill in cases":
            os.kill(os.getpid(), signal.SIGKILL)
        return "out: one row is off" if config["fault"] == "wrong in cases" else None

    def _at_length(self, config):
        match config["fault"]:
            case "wrong":
                return "out: relative error 1"
            case "slow to verify":
                time.sleep(3)
            case "prints":
                sys.stdout.write("\x00\xff garbage\n" * 100)
                sys.stdout.flush()
                os.write(1, b"\x01\x02\x03 raw garbage\n")
        return None

    def check(self):
        pass

    def sampler(self, config):
        match config["fault"]:
            case "hang":
                time.sleep(600)
            case "slow":
                time.sleep(0.2)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                os.write(2, b"about to fault\n")
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "out of memory":
                raise OutOfMemoryError("CUDA out of memory")
            case "illegal address":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            case "raises":
                raise KeyError("a bug")
        # A wrong kernel is often a fast one.
        ms, rng = true_ms(config) / FASTER.get(config["fault"], 1), random.Random(config.key)
        return lambda count: [ms * (1 + 0.01 * rng.random()) for _ in range(count)]


def make(spec, mode):
    return Stage(spec, mode)


class Echo:
    """A service for the channel's own tests."""

    def __init__(self, *arguments):
        if arguments and arguments[0] == "fail":
            raise ValueError("refused")
        self.arguments = arguments

    def echo(self, value):
        return value, os.getpid(), self.arguments

    def child(self, path):
        """Leave a grandchild behind that would outlive a careless kill."""
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        with open(path, "w") as f:
            f.write(str(pid))
        time.sleep(600)

    def program(self, path):
        """Wait for a program, as for ptxas."""
        child = subprocess.Popen(["sleep", "600"])
        with open(path, "w") as f:
            f.write(str(child.pid))
        child.wait()

    def fail(self, number):
        raise OSError(number, os.strerror(number))

    def lose_context(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def unpicklable(self):
        return lambda: None

    def slow_echo(self, seconds):
        time.sleep(seconds)
        return os.getpid()

    def environment(self, name):
        return os.environ.get(name)

    def modules(self):
        return set(sys.modules)

    def descriptors(self):
        return {fd: os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in ("0", "1", "2")}

    def exit(self):
        os.write(2, b"last words\n")
        os._exit(3)

    def fault(self):
        os.kill(os.getpid(), signal.SIGSEGV)


class Slow(Echo):
    """Takes ``seconds`` to set itself up."""

    def __init__(self, seconds):
        time.sleep(seconds)
        super().__init__()
