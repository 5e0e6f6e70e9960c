"""The page in a real browser: it is drawn, complains of nothing and asks no network for anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from test_page import hostile

from sparsek_tune.report import evidence, page

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: none of {', '.join(NAMES)} is installed")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # what the browser wants for itself does not get out either
)  # fmt: skip
CHECKED = '<img src="http://192.0.2.1/x.png"><script>document.title = "ran"; console.error("hm")</script>'


class Seen(NamedTuple):
    """picture: [height, width, 3 or 4] from 0 to 1; console: its lines; asked: what the page wanted from a network."""

    picture: object
    console: list[str]
    asked: list[str]


def look(folder: Path, text: str, size=(1280, 1600), *options: str) -> Seen:
    from matplotlib.image import imread

    for name in ("page.html", "page.png", "net.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "page.html").write_text(text)
    command = [
        BROWSER, *OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}",
        f"--screenshot={folder / 'page.png'}", f"--window-size={size[0]},{size[1]}", *options,
        (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (folder / "page.png").exists(), done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(imread(folder / "page.png"), console, asked(json.loads((folder / "net.json").read_text())))


def asked(log: dict) -> list[str]:
    """The addresses that the page asked for: what the browser asks for by itself has no origin."""
    start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [e["params"] for e in log["events"] if e["type"] == start and "url" in e.get("params", {})]
    return [j["url"] for j in jobs if j.get("initiator") != "not an origin" and not j["url"].startswith("file:")]


def colours(picture) -> dict[tuple[int, ...], float]:
    """The share of the picture that each colour has."""
    import numpy as np

    found, counts = np.unique((picture[..., :3] * 255).round().astype(int).reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, c)): n / counts.sum() for c, n in zip(found, counts, strict=True)}


def variables(dark: bool) -> dict[str, tuple[int, ...]]:
    """The colours of the style sheet."""
    usual, night = Path(page.__file__).with_name("page.css").read_text().split("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--([\w]+): #([0-9a-f]+)", night if dark else usual))
    wide = {name: "".join(c * 2 for c in x) if len(x) == 3 else x for name, x in found.items()}
    return {name: tuple(int(x[i : i + 2], 16) for i in (0, 2, 4)) for name, x in wide.items()}


@pytest.fixture(scope="module")
def usual(records):
    return page.render(evidence.gpus(records), "records.jsonl")


@pytest.mark.parametrize("size", [(1280, 4000), (500, 8500)], ids=["wide", "narrow"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_drawn(usual, tmp_path, size, dark):
    seen = look(tmp_path, usual, size, f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    assert not seen.console and not seen.asked
    assert seen.picture.shape[:2] == size[::-1]
    shares, wanted = colours(seen.picture), variables(dark)
    assert max(shares, key=lambda c: shares[c]) == wanted["card"] and shares[wanted["card"]] < 0.97
    # Text, curves and bars, races and the roofline's kernels, each in its own colour.
    assert all(shares.get(wanted[name], 0) > 0 for name in ("ink", "muted", "rule", "s0", "s1", "s2", "s3", "s4"))
    assert set(colours(seen.picture[:, -8:-4])) == {wanted["paper"]}  # nothing reaches out of the window


def test_nothing_of_the_database_runs_or_loads(records, tmp_path):
    seen = look(tmp_path, page.render(evidence.gpus(hostile(records)), "hostile"))
    assert not seen.console and not seen.asked


def test_these_tests_would_see_it(usual, tmp_path):
    """What runs or loads in such a page is blocked by its policy, and without that is seen."""
    broken = usual.replace("<main>", "<main>" + CHECKED)
    seen = look(tmp_path, broken)
    assert not seen.asked and len([line for line in seen.console if "Content Security Policy" in line]) == 2
    seen = look(tmp_path, re.sub("<meta http-equiv=[^>]*>", "", broken))
    assert seen.asked == ["http://192.0.2.1/x.png"] and any('"hm"' in line for line in seen.console)
    blank = look(tmp_path, "<!doctype html><title>x</title>")
    assert len(colours(blank.picture)) == 1
