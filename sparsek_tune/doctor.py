"""What is here, what is missing, and how to mend it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

NEEDED = {
    "torch": (2, 11),
    "triton": (3, 6),
    "numpy": (1, 26),
    "optuna": (4, 5),
    "sqlalchemy": (2, 0),
    "click": (8, 1),
    "rich": (13,),
    "jsonschema": (4, 20),
}
DRIVER = Path("/proc/driver/nvidia/version")


class Finding(NamedTuple):
    """level: "ok", "note" (works, but look) or "broken"; mend: what to do, where there is something to do."""

    subject: str
    level: str
    found: str
    mend: str = ""


def examine(storage: Path | str | None = None) -> list[Finding]:
    """Look at Python, the packages, the GPU, the compilers, the database (``storage``; None: the default file) and the
    shipped configs; changes nothing."""
    looks = LOOKS | {"database": lambda: _database(storage)}
    return [finding for subject, look in looks.items() for finding in _safely(subject, look)]


def _safely(subject: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(look())
    except Exception as error:  # what breaks here, whatever it is, is a finding
        return [Finding(subject, "broken", f"cannot look: {error!r}", "mend what is above first, then ask again")]


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    ok = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if ok else "broken", found, "" if ok else "use Python 3.11 or newer")


def _packages() -> Iterator[Finding]:
    have: dict[str, tuple[int, ...]] = {}
    for name, low in NEEDED.items():
        mend = f"pip install '{name}>={'.'.join(map(str, low))}'"
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "broken", "not installed", mend)
            continue
        have[name] = tuple(int(p) for p in found.split("+")[0].split(".")[:2] if p.isdigit())
        ok = have[name] >= low
        yield Finding(name, "ok" if ok else "broken", found, "" if ok else mend)
    if have.get("triton", (9,)) < (3, 8) and have.get("numpy", (0,)) >= (2, 4):
        found = "that of triton before 3.8 fails with numpy 2.4 and newer: static tuning can verify nothing"
        yield Finding("interpreter", "note", found, "pip install 'numpy<2.4', or a newer triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding("interpreter", "note", "TRITON_INTERPRET=1: kernels are interpreted", "unset TRITON_INTERPRET")


def _gpu() -> Iterator[Finding]:
    """No GPU is no fault, one that cannot be used is."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        yield _usable_gpu()
    elif not driver:
        mend = "install NVIDIA's driver and a CUDA build of torch; without a GPU `sparsek-tune run` tunes statically"
        yield Finding("gpu", "note", "no GPU, or no driver for it", mend)
    elif torch.version.cuda is None:
        found = f"there is a driver ({driver}), but torch {torch.__version__} is built without CUDA"
        yield Finding("gpu", "broken", found, "install a CUDA build of torch")
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        found = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} leaves no GPU"
        yield Finding("gpu", "broken", found, "unset it, or set it to a GPU that `nvidia-smi -L` lists")
    else:
        found = f"torch's CUDA {torch.version.cuda} finds no GPU under driver {driver}"
        mend = "see that `nvidia-smi` works; then upgrade the driver, or install torch for an older CUDA"
        yield Finding("gpu", "broken", found, mend)


def _usable_gpu() -> Finding:
    from sparsek_tune.problem import current_device

    d = current_device()
    found = f"{d.name}, compute capability {d.cc / 10}, {d.sm_count} SMs, driver {d.driver or 'unknown'}, CUDA {d.cuda}"
    if d.cc < 80:
        return Finding("gpu", "broken", found, "a GPU of compute capability 8.0 or newer is needed")
    return Finding("gpu", "ok", found)


def _compilers() -> Iterator[Finding]:
    """What Triton builds with: ptxas for kernels, the C compiler for the code that launches them."""
    import triton

    ptxas = Path(os.environ.get("TRITON_PTXAS_PATH") or Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    ok = os.access(ptxas, os.X_OK)
    mend = "" if ok else "reinstall triton, which brings it, or unset TRITON_PTXAS_PATH"
    yield Finding("ptxas", "ok" if ok else "broken", str(ptxas) if ok else f"{ptxas} cannot be run", mend)
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))), None)
    if compiler:
        yield Finding("C compiler", "ok", compiler)
    else:
        level = "broken" if _driver() else "note"
        yield Finding("C compiler", level, "none: no kernel can be launched", "install gcc, or set CC to a C compiler")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    ok = _writable(cache)
    mend = "" if ok else "set TRITON_CACHE_DIR to a directory that can be written"
    yield Finding("Triton cache", "ok" if ok else "broken", f"{cache}{'' if ok else ' cannot be written'}", mend)


def _database(storage: Path | str | None = None) -> Iterator[Finding]:
    from sparsek_tune.db import errors
    from sparsek_tune.db.reader import default_path
    from sparsek_tune.db.store import Store

    elsewhere = f"mend the permissions, or {errors.ELSEWHERE}"
    try:
        path = storage or default_path()
        with Store(path, read_only=True) as store:
            entries, name = store.winners(), store.path
    except errors.MissingError as error:
        if isinstance(path, str):
            yield Finding("database", "note", str(error))
        elif _writable(path.parent):
            yield Finding("database", "note", f"{path} does not exist yet", "run `sparsek-tune run`")
        else:
            yield Finding("database", "broken", f"{path} does not exist and cannot be made", elsewhere)
        return
    except errors.DatabaseError as error:
        yield Finding("database", "broken", str(error), "see there; until then the default configs are used")
        return
    found = f"{name}: {len(entries)} tuned kernels"
    if isinstance(path, str) or (os.access(path, os.W_OK) and path.stat().st_mode & 0o222 and _writable(path.parent)):
        yield Finding("database", "ok", found)
    else:
        yield Finding("database", "note", f"{found}, read only", f"to tune, {elsewhere}")
    yield from _served(Counter((e.template, e.source_hash, e.static, e.device.kind, e.device.cc) for e in entries))


def _served(stored: Counter[tuple[str, str, bool, str, int]]) -> Iterator[Finding]:
    """Which of the stored winners are of the kernels as they are, and which kernels have none measured for the GPU."""
    import torch

    from sparsek_tune.kernel_templates import TEMPLATES
    from sparsek_tune.problem import current_device

    hashes = {name: template.source_hash for name, template in TEMPLATES.items()}
    stale = sum(n for (name, source, *_), n in stored.items() if hashes.get(name) != source)
    if stale:
        mend = "they are not used; run `sparsek-tune run` again for those shapes"
        yield Finding("stale", "note", f"{stale} tuned kernels are of another template version", mend)
    if torch.cuda.is_available():
        device = current_device()
        missing = [name for name in TEMPLATES if not stored[name, hashes[name], False, device.kind, device.cc]]
        found = (
            f"nothing measured for {device.name}: {', '.join(missing)}" if missing else f"measured for {device.name}"
        )
        yield Finding("tuned", "note" if missing else "ok", found, "run `sparsek-tune run`" if missing else "")


def _shipped() -> Iterator[Finding]:
    from sparsek_tune.db.reader import SHIPPED, load_shipped

    fault = load_shipped("cuda", 0).reason  # reads every file
    if fault:
        yield Finding("shipped", "broken", fault, "reinstall sparsek-tune")
    else:
        yield Finding("shipped", "ok", f"configs of {len(list(SHIPPED.glob('*.json')))} GPUs come with the package")


def _driver() -> str:
    """What the NVIDIA driver calls itself; empty where there is none."""
    try:
        return DRIVER.read_text(encoding="utf-8").splitlines()[0].removeprefix("NVRM version: ").strip()
    except (OSError, IndexError):
        return ""


def _writable(directory: Path) -> bool:
    """Whether files can be made in ``directory``, or it in the nearest directory that exists."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


LOOKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": _python,
    "packages": _packages,
    "gpu": _gpu,
    "compilers": _compilers,
    "database": _database,
    "shipped": _shipped,
}
