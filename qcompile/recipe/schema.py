"""The schema of recipes on disk: plain data of an older schema is upgraded, of an unknown one refused.

Schema 1 used private words for passes and fields; schema 2 uses those of the field. A file carries the version of
qcompile that wrote it, which the error about an unknown schema names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from qcompile.version import VERSION

SCHEMA = 2

_PASSES = {
    "Smooth": "SmoothQuant",
    "Reorder": "ReorderChannels",
    "RotateOnline": "OnlineHadamard",
    "LearnRotation": "SpinQuant",
    "PerTensor": "PerTensorActivations",
}
_OF_QUANTIZE = {"output": "lm_head", "output_act": "lm_head_act"}
_OF_GPTQ = {**_OF_QUANTIZE, "damping": "damp_percent", "order": "act_order", "block": "block_size"}
_FIELDS: dict[str, dict[str, str]] = {  # by the pass's name in schema 2
    "FoldNorm": {"centre": "center"},
    "SpinQuant": {"rate": "lr"},
    "CalibratePrefix": {"rate": "lr"},
    "QuantizeKV": {"intact": "sink_tokens", "fixed": "static"},
    "PerTensorActivations": {"output": "lm_head"},
    "Quantize": _OF_QUANTIZE,
    "HQQ": _OF_QUANTIZE,
    "FineQuant": {**_OF_QUANTIZE, "sizes": "group_sizes"},
    "GPTQ": _OF_GPTQ,
    "GPTAQ": _OF_GPTQ,
    "DGQ": _OF_GPTQ,
}


class SchemaUpgraded(UserWarning):
    """A file of an older schema was read; it is not changed on disk."""


class UnknownSchema(ValueError):
    """A file of a schema that this version cannot read."""


def stamp() -> dict[str, Any]:
    """What every file begins with: its schema and the version that writes it."""
    return {"schema": SCHEMA, "qcompile": VERSION}


def upgraded_recipe(data: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A recipe as plain data of the present schema.

    Args:
        data: plain data of a recipe, of schema 1 or 2.
        what: what holds it, for messages: "recipe 'mine'", a path.

    Raises:
        UnknownSchema: neither of them; the text names the version that wrote it.
    """
    return upgraded(data) if is_older(data, what) else dict(data)


def upgraded(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of schema 1 in schema 2."""
    return {**recipe, **stamp(), "passes": [_upgraded_pass(entry) for entry in recipe.get("passes", [])]}


def is_older(data: Mapping[str, Any], what: str) -> bool:
    """Whether plain data is of schema 1, with a warning that says it is upgraded. Raises UnknownSchema."""
    found = data.get("schema")
    if found == SCHEMA:
        return False
    if found != 1:
        writer = data.get("qcompile")
        by = f"written by qcompile {writer}" if writer else "by an unknown writer"
        raise UnknownSchema(
            f"{what} has schema {found!r}, {by}; qcompile {VERSION} reads 1 and {SCHEMA}. "
            "Fix: install the version that wrote it, or a newer one"
        )
    warnings.warn(f"{what} was upgraded from schema 1 to {SCHEMA}", SchemaUpgraded, stacklevel=3)
    return True


def _upgraded_pass(entry: Mapping[str, Any]) -> dict[str, Any]:
    name = _PASSES.get(entry.get("pass", ""), entry.get("pass", ""))
    fields = _FIELDS.get(name, {})
    return {"pass": name, **{fields.get(k, k): v for k, v in entry.items() if k != "pass"}}
