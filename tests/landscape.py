"""A template of 600 points without a kernel, and what its configs take."""

from __future__ import annotations

from sparsek_tune.kernel_templates.base import Choice, Config, Cost, Param, Pow2, Template


def large(check=lambda config, problem, device: None):
    """5 x 4 x 6 x (4 where staged, else 1) points; the fastest is a 64, b "z", c 2."""
    return Template(
        name="large",
        fields=frozenset({"n"}),
        space=(
            Param("a", Pow2(16, 256)),
            Param("b", Choice(("w", "x", "y", "z"))),
            Param("c", Pow2(1, 32)),
            Param("staged", Choice((False, True))),
            Param("depth", Pow2(1, 8), when=lambda c: bool(c["staged"])),
        ),
        default=lambda problem, device: Config(a=32, b="w", c=4, staged=False, depth=1),
        check=check,
        cost=lambda config, problem: Cost(1.0, 1.0),
        sources=(__file__,),
    )


def ms(config):
    a = abs(config["a"].bit_length() - 7)
    return 1.0 + a + abs(config["c"].bit_length() - 2) + (config["b"] != "z") + 0.5 * config["staged"]
