"""Attention shapes: those of published models, and those that a user spells out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsek_tune.limits import HEAD_MAX, INT_MAX, LENGTH_MAX, ROWS_MAX, group_max
from sparsek_tune.problem import DTYPES, GATES, Problem

# (query heads, KV heads, head size), from each model's published configuration: num_attention_heads,
# num_key_value_heads and head_dim (hidden_size / num_attention_heads where it has none) in the config.json of
# meta-llama/Llama-3.1-8B and -70B, Qwen/Qwen3-0.6B, -4B and -8B, mistralai/Mistral-7B-v0.3, EleutherAI/pythia-160m and
# -1.4b, openai-community/gpt2 (n_head, n_embd).
MODELS: dict[str, tuple[int, int, int]] = {
    "llama-3.1-8b": (32, 8, 128),
    "llama-3.1-70b": (64, 8, 128),
    "qwen3-0.6b": (16, 8, 128),
    "qwen3-4b": (32, 8, 128),
    "qwen3-8b": (32, 8, 128),
    "mistral-7b": (32, 8, 128),
    "pythia-160m": (12, 12, 64),
    "pythia-1.4b": (16, 16, 128),
    "gpt2-small": (12, 12, 64),
}


@dataclass(frozen=True)
class Shape:
    """One call of the operator. hq, hkv: query, KV heads; d: head size; n: length; k: budget; w: window; b: batch."""

    hq: int = 32
    hkv: int = 8
    d: int = 128
    n: int = 16384
    k: int = 512
    w: int = 512
    dtype: str = "bf16"
    gate: str = "kv"
    b: int = 1

    def __post_init__(self) -> None:
        for name in ("hq", "hkv", "d", "n", "k", "b"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.w < 0:
            raise ValueError(f"w must be at least 0, but is {self.w}")
        for name, most in (("d", HEAD_MAX), ("hkv", ROWS_MAX), ("n", LENGTH_MAX), ("k", INT_MAX), ("w", INT_MAX)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, but is {getattr(self, name)}")
        for name, allowed in (("dtype", DTYPES), ("gate", GATES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, but is {getattr(self, name)!r}")
        if self.hq % self.hkv:
            raise ValueError(f"hq must be a multiple of hkv, but is {self.hq} with hkv {self.hkv}")
        if self.hq > (most := group_max(self.d, self.dtype) * self.hkv):
            raise ValueError(f"hq must be at most {most} at hkv {self.hkv}, d {self.d}, {self.dtype}, but is {self.hq}")
        if self.b * self.hkv > ROWS_MAX:
            raise ValueError(f"b must be at most {ROWS_MAX // self.hkv} at hkv {self.hkv}, but is {self.b}")

    @property
    def problem(self) -> Problem:
        g = self.hq // self.hkv
        return Problem.of(self.dtype, self.d, g, self.gate, self.k, self.w, self.n, self.b * self.hkv)


def parse_fields(text: str) -> dict[str, int | str]:
    """The fields that ``text`` ("n=4096,k=1024,dtype=bf16") sets. Raises ValueError that names the field at fault."""
    known = Shape.__dataclass_fields__
    fields: dict[str, int | str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, sign, value = part.partition("=")
        if not sign or name not in known:
            raise ValueError(f"a shape is written field=value,... with the fields {', '.join(known)}; got {part!r}")
        if name in fields:
            raise ValueError(f"{name} is given twice in {text!r}")
        if isinstance(known[name].default, str):
            fields[name] = value
        elif not (value.isascii() and value.removeprefix("-").isdigit()):
            raise ValueError(f"{name} must be a whole number, but is {value!r}")
        elif len(value) > 19:
            raise ValueError(f"{name} must have at most 19 digits, but is {value!r}")
        else:
            fields[name] = int(value)
    return fields


def shapes(models: tuple[str, ...], texts: tuple[str, ...]) -> list[Shape]:
    """Every model at every shape text; a text's fields win over the model's. Without either, the default suite."""
    if not models and not texts:
        return [Shape(n=4096), Shape(n=16384), Shape(hq=12, hkv=12, d=64, n=4096)]
    bases = [Shape()]
    if models:
        bases = [Shape(hq=hq, hkv=hkv, d=d) for hq, hkv, d in (MODELS[m] for m in models)]
    found = [replace(base, **parse_fields(text)) for base in bases for text in texts or ("",)]  # type: ignore[arg-type]
    return list(dict.fromkeys(found))
