"""The configs that are shipped: readable, for this GPU's kernels as they are, and served for the presets."""

from __future__ import annotations

import json

import pytest

from sparsek_tune import dispatch, presets
from sparsek_tune.db import reader
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.kernel_templates.base import Config
from sparsek_tune.presets import MODELS

SHIPPED = reader.SHIPPED
FILES = sorted(SHIPPED.glob("*.json"))


def entries(file):
    return reader.parse(json.loads(file.read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_config_is_measured_and_in_its_space(file):
    found = entries(file)
    assert found
    for entry in found:
        template = TEMPLATES[entry.template]
        assert not entry.static and entry.tuned_ms is not None and entry.tuned_ms <= entry.default_ms
        if entry.source_hash == template.source_hash:
            assert template.contains(Config.from_key(entry.config))
            assert entry.problem == entry.problem.project(template.fields)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("model", MODELS)
def test_every_preset_is_served_what_is_shipped(file, model, tmp_path):
    found = entries(file)
    if {(e.template, e.source_hash) for e in found} != {(t.name, t.source_hash) for t in TEMPLATES.values()}:
        pytest.skip("of other kernel sources: to be tuned again")
    (shape,) = presets.shapes((model,), ())
    plan = dispatch.resolve(shape.problem, found[0].device, tmp_path / "none.db", shipped=SHIPPED)
    assert {name: r.grade for name, r in plan.items()} == dict.fromkeys(TEMPLATES, "shipped")
