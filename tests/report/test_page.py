"""The page says what there is, loads nothing, and takes nothing from the database for markup."""

from __future__ import annotations

import copy
import time
from collections import Counter
from html.parser import HTMLParser

import pytest
import simulated

from sparsek_tune.problem import target_device
from sparsek_tune.report import evidence, figures, page

HOSTILE = (
    "</td><script>alert(1)</script><img src=http://192.0.2.1/ onerror=alert(2)>\"'&amp;{{ 7 * 7 }}\u202e\x00\x1b[2J"
)
ATTRIBUTES = {"href", "src", "xlink:href", "style", "action", "srcset", "data"}


class Parsed(HTMLParser):
    """The tags, the attributes that could load something, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.references: list[tuple[str, str]] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            self.handlers += [name] if name.startswith("on") else []
            self.ids += [value] if name == "id" else []
            if name in ATTRIBUTES:
                self.references.append((name, value))

    def handle_data(self, data):
        self.words += data


def rendered(records, source="records.jsonl"):
    return page.render(evidence.gpus(records), source)


def hostile(records):
    """All text of some records replaced by what a page must not take for markup."""
    changed = copy.deepcopy(records)
    for i, record in enumerate(changed):
        record["reason"] = HOSTILE if record["reason"] else ""
        for text in ("driver", "cuda", "triton", "torch", *(["name"] if record["device"]["cc"] == 80 else [])):
            record["device"][text] = HOSTILE
        if record["template"]["name"] == "dq":
            record["template"] = {"name": HOSTILE, "source_hash": HOSTILE, "space_version": HOSTILE}
            record["config"] = {HOSTILE: i, "BM": HOSTILE}
        if record["template"]["name"] == "dkv":
            record["problem"].update(dtype=HOSTILE, gate=HOSTILE)
    return changed


def test_what_is_stored_is_shown(records):
    text = rendered(records)
    words = Parsed(text).words
    for gpu in evidence.gpus(records):
        assert gpu.device.name in words
        for s in gpu.searches:
            assert str(s.problem) in words and page.words(s.winner.config) in words
            assert page.significant(s.winner.tuned_ms) in words
            assert s.winner.config == s.default or f"{s.winner.speedup:.2f}×" in words
    for part in ("a thread spills", "TFLOP/s", "CHUNK", f"{len(records)} measurements", "989"):
        assert part in words
    assert text.isascii()
    assert Parsed(text).tags["svg"] == 2 * (10 + 1)


def test_the_same_records_give_the_same_page(records):
    assert rendered(records) == rendered(records)


@pytest.mark.parametrize("change", [lambda records: records, hostile], ids=["usual", "hostile"])
def test_nothing_is_loaded_and_nothing_runs(records, change):
    text = rendered(change(records))
    found = Parsed(text)
    assert not found.handlers
    assert not found.tags.keys() & {"script", "img", "link", "iframe", "object", "embed", "form", "image", "audio"}
    for name, value in found.references:
        assert value.startswith("#") if name != "style" else "url(" not in value, (name, value)
    inside = set(found.ids)
    assert len(inside) == len(found.ids)
    assert {value[1:] for name, value in found.references if name.endswith("href")} <= inside
    assert "default-src 'none'" in text
    assert "url(" not in text.replace("url(#", "") and "@import" not in text


def test_what_the_database_says_is_text(records):
    """A page of hostile records has the same tags, but for those of what can then not be computed."""
    text = rendered(hostile(records), source=HOSTILE)
    found = Parsed(text)
    assert "<script>alert(1)</script>" in found.words and "{{ 7 * 7 }}" in found.words
    assert "<script" not in text and "<img" not in text
    assert not {"\u202e", "\x00", "\x1b"} & set(found.words)
    assert set(found.tags) == set(Parsed(rendered(records)).tags)


def test_long_text_is_cut(records):
    changed = copy.deepcopy(records)
    for record in changed:
        record["reason"] = record["reason"] and "x" * 8000
        record["device"]["driver"] = "y" * 8000
    assert len(rendered(changed)) < len(rendered(records)) + 5000


def test_static_results_are_shown_as_such(records):
    target = target_device("cuda:90")
    static = copy.deepcopy(simulated.simulate(devices=[target], trials=8))
    for record in static:
        record["status"] = "static" if record["status"] == "ok" else record["status"]
        record["median_ms"] = record["ci_low_ms"] = record["ci_high_ms"] = record["median_ms"] and 1234.5
        if record["winner"]:
            record["winner"] = {"default_ms": None, "tuned_ms": None}
    text = rendered(static)
    assert text.count("static: not timed") == 10 and "Static: no GPU was there" in text
    assert "1234" not in text and "<svg" not in text
    mixed = rendered(records + static)
    assert mixed.count("static: not timed") == 10 and mixed.count("<svg") == rendered(records).count("<svg")


def test_a_gpu_without_known_peaks_gets_no_roof(records):
    changed = copy.deepcopy([r for r in records if r["device"]["cc"] == 90])
    for record in changed:
        record["device"]["name"] = "NVIDIA H800"
    words = Parsed(rendered(changed)).words
    assert "No roof: the peaks of this GPU are not known here" in words and "NVIDIA H200" in words
    assert "989 TFLOP/s" not in words


def test_too_few_measurements_are_named(records):
    words = Parsed(rendered(simulated.simulate(trials=5))).words
    assert "Too few measurements: 0 timed configs" in words and "needed are 50" in words


def test_a_search_without_a_winner_and_one_that_only_failed(records):
    changed = copy.deepcopy([r for r in records if r["template"]["name"] in ("forward", "dq")])
    for record in changed:
        record["winner"] = None
    words = Parsed(rendered(changed)).words
    assert "no winner yet: 8" in words and "No winner here was timed" in words
    failed = [r for r in changed if r["status"] not in ("ok", "static")]
    words = Parsed(rendered(failed)).words
    assert "Nothing was timed here" in words and "best" not in words.split("Search curves")[0].split("Winners")[1]


def test_another_source_is_marked(records):
    changed = copy.deepcopy(records)
    for record in changed:
        if record["template"]["name"] == "forward":
            record["template"]["source_hash"] = "0123456789abcdef"
    assert "other source 0123456" in rendered(changed) and "other source" not in Parsed(rendered(records)).words


def test_many_measurements_stay_quick_and_small():
    problems = [simulated.LONG._replace(n=1 << (10 + i % 10), k=64 << (i // 10)) for i in range(60)]
    many = simulated.simulate(problems, trials=50)
    assert len(many) > 25_000
    start = time.process_time()
    text = rendered(many)
    assert len(text) < 3_000_000
    assert time.process_time() - start < 60  # some 5 on an idle core
    assert "more are in the table" in text


def test_figures_hold_numbers_alone(records):
    """No text of the database, so that it is escaped in one place; colours of the style sheet, no ids in common."""
    searches = [s for gpu in evidence.gpus(hostile(records)) for s in gpu.searches]
    drawn = [str(figures.curve(s, str(i))) for i, s in enumerate(searches[:4])]
    for svg in drawn:
        assert set(filter(str.isalpha, Parsed(svg).words.replace("configs tried", "").replace("race", ""))) <= set("ms")
        assert "var(--s0)" in svg and "#0000" not in svg and "font-family" not in svg
        assert svg.startswith("<svg") and svg.endswith("</svg>") and "<style" not in svg
    ids = [i for svg in drawn for i in Parsed(svg).ids]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "x, text",
    [(None, "-"), (1.0, "1.000"), (0.0123456, "0.01235"), (19.536, "19.54"), (12345.6, "1.235e+04"), (1234.4, "1234")],
)
def test_numbers_are_read_easily(x, text):
    assert page.significant(x) == text
