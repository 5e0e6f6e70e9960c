"""What is here, what is missing, and how to mend it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

NEEDED = {"torch": (2, 11), "triton": (3, 6), "optuna": (4, 5), "sqlalchemy": (2, 0), "click": (8, 1), "numpy": (1, 26)}


class Finding(NamedTuple):
    """level: "ok", "note" (works, but look) or "broken"; mend: what to do, where there is something to do."""

    subject: str
    level: str
    found: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look at Python, the packages, the GPU, the database and the shipped configs; changes nothing."""
    return [_python(), *map(_package, NEEDED), _gpu(), *_database(), _shipped()]


def _python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    ok = sys.version_info >= (3, 11)
    return Finding("python", "ok" if ok else "broken", found, "" if ok else "use Python 3.11 or newer")


def _package(name: str) -> Finding:
    low = ".".join(map(str, NEEDED[name]))
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "broken", "not installed", f"pip install '{name}>={low}'")
    parts = tuple(int(p) for p in found.split("+")[0].split(".")[:2] if p.isdigit())
    if parts < NEEDED[name]:
        return Finding(name, "broken", found, f"pip install '{name}>={low}'")
    return Finding(name, "ok", found)


def _gpu() -> Finding:
    try:
        from sparsek_tune.problem import current_device

        d = current_device()
    except ImportError as error:
        return Finding("gpu", "broken", f"cannot look: {error}", "install torch")
    except RuntimeError as error:
        mend = "install a driver and a CUDA build of torch; without a GPU, `sparsek-tune run` tunes statically"
        return Finding("gpu", "note", str(error), mend)
    found = f"{d.name}, compute capability {d.cc / 10}, {d.sm_count} SMs, driver {d.driver or 'unknown'}, CUDA {d.cuda}"
    if d.cc < 80:
        return Finding("gpu", "broken", found, "a GPU of compute capability 8.0 or newer is needed")
    return Finding("gpu", "ok", found)


def _database() -> list[Finding]:
    try:
        from sparsek_tune.db import errors
        from sparsek_tune.db.reader import default_path
        from sparsek_tune.db.store import Store
    except ImportError as error:
        return [Finding("database", "broken", f"cannot look: {error}", "install the missing package")]
    try:
        path = default_path()
        with Store(path, read_only=True) as store:
            entries = store.winners()
    except errors.MissingError:
        return [Finding("database", "note", f"{path} does not exist yet", "run `sparsek-tune run`")]
    except errors.DatabaseError as error:
        return [Finding("database", "broken", str(error), "see there; until then the default configs are used")]
    stale = sum(e.source_hash != _hash(e.template) for e in entries)
    findings = [Finding("database", "ok", f"{path}: {len(entries)} tuned kernels")]
    if stale:
        mend = "they are not used; run `sparsek-tune run` again for those shapes"
        findings.append(Finding("stale", "note", f"{stale} tuned kernels are of another template version", mend))
    return findings


def _hash(template: str) -> str:
    from sparsek_tune.kernel_templates import TEMPLATES

    return TEMPLATES[template].source_hash if template in TEMPLATES else ""


def _shipped() -> Finding:
    from sparsek_tune.db.reader import load_shipped

    try:
        from sparsek_tune.problem import current_device

        cc = current_device().cc
    except (ImportError, RuntimeError):
        cc = 90
    found = load_shipped("cuda", cc)
    if found.broken:
        return Finding("shipped", "broken", found.reason, "reinstall sparsek-tune")
    return Finding("shipped", "ok", f"{len(found.entries)} shipped configs for compute capability {cc / 10}")
