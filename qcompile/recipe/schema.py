"""The schema of recipes and checkpoints: plain data of schema 1 is upgraded, of an unknown schema refused.

Schema 2 renamed passes and fields to the terms of the field. Every file has a stamp: its schema, and the version of
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


def upgraded_recipe(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A recipe as plain data of the present schema.

    Args:
        data: plain data of a recipe, of schema 1 or 2.
        source: where it is from, for messages: "recipe 'mine'", a path.

    Raises:
        UnknownSchema: another schema; the text names the version that wrote it.
    """
    return upgrade(data) if needs_upgrade(data, source) else dict(data)


def needs_upgrade(data: Mapping[str, Any], source: str) -> bool:
    """Whether stamped data is of schema 1; warns that it is upgraded.

    Args:
        data: a recipe, or the description of a checkpoint.
        source: where it is from, for messages.

    Raises:
        UnknownSchema: another schema; the text names the version that wrote it.
    """
    schema = data.get("schema")
    if schema == SCHEMA:
        return False
    if schema != 1:
        writer = data.get("qcompile")
        by = f"written by qcompile {writer}" if writer else "by an unknown writer"
        raise UnknownSchema(
            f"{source} has schema {schema!r}, {by}; qcompile {VERSION} reads 1 and {SCHEMA}. "
            "Fix: install the version that wrote it, or a newer one"
        )
    warnings.warn(f"{source} was upgraded from schema 1 to {SCHEMA}", SchemaUpgraded, stacklevel=3)
    return True


def upgrade(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of schema 1 in schema 2."""
    return {**recipe, **stamp(), "passes": [_upgrade_pass(entry) for entry in recipe.get("passes", [])]}


def _upgrade_pass(entry: Mapping[str, Any]) -> dict[str, Any]:
    name = _PASSES.get(entry.get("pass", ""), entry.get("pass", ""))
    renamed = _FIELDS.get(name, {})
    return {"pass": name, **{renamed.get(k, k): v for k, v in entry.items() if k != "pass"}}
