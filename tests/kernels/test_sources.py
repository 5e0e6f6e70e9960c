"""What the kernel sources promise: our own tuner alone, no deprecated API, no dependence on an order of atomics."""

from pathlib import Path

import pytest

from sparsek_tune import launch, launcher, replay
from sparsek_tune.kernel_templates import FAMILIES, TEMPLATES, base

FILES = sorted(Path(base.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("word", ["triton.autotune", "triton.heuristics", "make_block_ptr"])
def test_no_use_of(word):
    assert [f.name for f in FILES if word in f.read_text()] == []


def test_atomics_add_integers_only():
    lines = [line.strip() for f in FILES for line in f.read_text().splitlines() if "tl.atomic" in line]
    # All add int64: counts, and sums of fixed-point values (walk).
    added = [line.split(",")[1].strip() for line in lines]
    assert added == ["counts", "total", "-high"]


def test_every_launch_states_fp_fusion_and_none_reads_the_device():
    text = "".join(Path(module.__file__).read_text() for module in (launch, launcher, replay))
    launches = [line for line in text.splitlines() if "kernel.warmup(" in line or "kernel[grid](" in line]
    assert len(launches) == 2 and all("enable_fp_fusion=True" in line for line in launches)
    assert not any(word in text for word in (".item()", ".cpu()", ".tolist()", "nonzero"))


def test_families_are_the_files_that_end_in_a_template():
    with_template = {f.stem for f in FILES if "\nTEMPLATE = Template(" in f.read_text()}
    assert with_template == set(FAMILIES) == set(TEMPLATES)
    for template in TEMPLATES.values():
        assert len(template.source_hash) == 16 and template.size > 1
