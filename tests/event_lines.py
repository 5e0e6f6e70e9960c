"""Reads what `sparsek-tune run --json` prints, and checks every line."""

from __future__ import annotations

import json

from jsonschema import Draft202012Validator

from sparsek_tune.events import SCHEMA

_VALIDATOR = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def check(line):
    """The document of one line, which is right by the schema."""
    document = json.loads(line)
    # The one schema that its kind of line has: errors of the others only hide what is wrong.
    kind = document["event"] if document["event"] in ("run", "end") else "event"
    _VALIDATOR.evolve(schema={**_VALIDATOR.schema, "oneOf": [{"$ref": f"#/$defs/{kind}"}]}).validate(document)
    _VALIDATOR.validate(document)
    return document


def parse(text):
    """The documents of all lines."""
    assert text.endswith("\n")
    return [check(line) for line in text.splitlines()]
