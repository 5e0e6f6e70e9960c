"""The benchmark's document: where it is written, and the tables that a person reads. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsek_tune.bench.cases import STAGES, case_of
from sparsek_tune.display import table
from sparsek_tune.files import replacing

SCHEMA = 2
Entry = Mapping[str, Any]


def write(path: Path, document: Mapping[str, Any]) -> None:
    """The document as JSON at ``path``: whole, whenever the process is killed. Raises OSError."""
    with replacing(path) as file:
        json.dump(document, file, indent=1)
        file.write("\n")


def read(path: Path) -> dict[str, Any]:
    """A document that :func:`write` wrote. Raises ValueError, saying why, for anything else; OSError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON document: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("cases"), list) or "protocol" not in document:
        raise ValueError(f"{path} was not written by sparsek-tune bench")
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {document.get('schema')}; this version reads {SCHEMA}")
    return document


def merge(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One document with the cases of all. Raises ValueError where GPU or software differ: such times compare badly."""
    first = documents[0]
    for other in documents[1:]:
        for name in ("device", "versions"):
            if other[name] != first[name]:
                raise ValueError(f"{name} of {other['date']} differs from that of {first['date']}")
    peers = {name: p for d in documents for name, p in d["peers"].items()}
    missing = {name: why for d in documents for name, why in d["missing"].items() if name not in peers}
    cases = [case for d in documents for case in d["cases"]]
    return {**first, "peers": peers, "missing": missing, "cases": cases}


def failures(document: Mapping[str, Any]) -> list[str]:
    """One line for every case of ours that failed."""
    return [f"{case_of(c)}: {c['error']}" for c in document["cases"] if c.get("error")]


def show(document: Mapping[str, Any]) -> None:
    """Every table, on stdout. Times in ms: medians."""
    cases = document["cases"]
    d, v = document["device"], document["versions"]
    software = ", ".join(f"{name} {x}" for name, x in v.items() if x)
    _table(f"Stages (ms), cold L2: {d['name']}, {software}", STAGE_COLUMNS, cases)
    _table("The operator", TOTAL_COLUMNS, cases)
    rows = [row for c in cases for row in _peer_rows(c)]
    if rows:
        header = ("case", "peer", "forward", "95 %", "x ours", "fwd+bwd", "95 %", "x ours", "")
        table("\nBeside it (ms)", header, rows)
        table("\n", ("peer", "version", "what it computes"), [
            (name, p["version"], p["note"]) for name, p in document["peers"].items()
        ])  # fmt: skip
    if document.get("missing"):
        table("", ("peer", "left out, because"), list(document["missing"].items()))


def _table(title: str, columns: Sequence[tuple[str, Callable[[Entry], Any]]], cases: Sequence[Entry]) -> None:
    rows = [(str(case_of(c)), *(read(c) for _, read in columns)) for c in cases]
    table("\n" + title, ("case", *(name for name, _ in columns)), rows)


def get(entry: Any, *path: str) -> Any:
    """What lies at ``path`` in an entry, None where it was not measured."""
    for name in path:
        entry = entry.get(name) if isinstance(entry, Mapping) else None
    return entry


def _at(*path: str, scale: float = 1.0) -> Callable[[Entry], Any]:
    def read(entry: Entry) -> Any:
        x = get(entry, *path)
        return x * scale if isinstance(x, float | int) else x

    return read


def _grades(entry: Entry) -> str | None:
    found = list(dict.fromkeys(r["grade"] for r in entry.get("configs", {}).values()))
    return "/".join(found) or None


def _worst(entry: Entry) -> str | None:
    """The largest relative error that the check found, or what went wrong."""
    if entry.get("error"):
        return entry["error"]
    errors = [x for part in entry.get("check", {}).values() for name, x in part.items()
              if isinstance(x, float) and name != "tolerance"]  # fmt: skip
    return f"{max(errors):.1e}" if errors else None


STAGE_COLUMNS: list[tuple[str, Callable[[Entry], Any]]] = [
    ("torch.sort", _at("sort", "median")),
    *((name, _at("stages", name, "median")) for name in STAGES),
    ("threshold, schedule", _at("index", "median")),
    ("index %", _at("index_share", scale=100.0)),
    ("fwd kernel TFLOP/s", _at("tflops", "kernel_forward")),
    ("dq+dkv TFLOP/s", _at("tflops", "kernel_backward")),
    ("index B/token", _at("index_bytes_per_token")),
    ("grade", _grades),
    ("worst error", _worst),
]
TOTAL_COLUMNS: list[tuple[str, Callable[[Entry], Any]]] = [
    ("forward ms", _at("totals", "forward", "median")),
    ("in a graph", _at("totals", "forward_graph", "median")),
    ("fwd+bwd", _at("totals", "forward_backward", "median")),
    ("fwd TFLOP/s", _at("tflops", "forward")),
    ("fwd+bwd TFLOP/s", _at("tflops", "forward_backward")),
    ("fwd MiB", _at("memory", "forward", scale=2.0**-20)),
    ("fwd+bwd MiB", _at("memory", "forward_backward", scale=2.0**-20)),
    ("host us", _at("host_us", "forward", "median")),
    ("host us, after idle", _at("host_us", "forward_after_idle", "median")),
    ("host us, grad", _at("host_us", "forward_with_grad", "median")),
]


def _peer_rows(entry: Entry) -> list[tuple[Any, ...]]:
    return [
        (
            str(case_of(entry)), name, *_timing(row, "forward"), *_timing(row, "forward_backward"),
            row.get("failed") or row.get("skipped") or "",
        )
        for name, row in entry["peers"].items()
    ]  # fmt: skip


def _timing(row: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    time = row.get(name)
    interval = f"{time['low']:.3f}-{time['high']:.3f}" if time else None
    return get(time, "median"), interval, get(row, "ratio", name)
