"""Recipes of schema 1 are today's; unknown schemas are refused with the version that wrote them.

tests/data/schema1 holds files that the last version with schema 1 wrote.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qcompile.numerics.format import Format
from qcompile.passes import (
    GPTQ,
    CalibratePrefix,
    FineQuant,
    FoldNorm,
    Fuse,
    OnlineHadamard,
    PerTensorActivations,
    QuantizeKV,
    Rotate,
    SmoothQuant,
    Untie,
)
from qcompile.pipeline.presets import PRESETS
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.registry import registered
from qcompile.recipe.rule import RecipeError, Rule
from qcompile.recipe.schema import (
    _FIELDS,
    _PASSES,
    SCHEMA,
    SchemaUpgraded,
    UnknownSchema,
    needs_upgrade,
    stamp,
    upgrade,
    upgraded_recipe,
)
from qcompile.version import VERSION

DATA = Path(__file__).parents[1] / "data/schema1"
OLD_PRESETS = json.loads((DATA / "presets.json").read_text())


@pytest.mark.parametrize("data", OLD_PRESETS, ids=lambda data: data["name"])
def test_a_preset_of_schema_1_is_todays(data):
    with pytest.warns(SchemaUpgraded, match=f"recipe '{data['name']}' was upgraded from schema 1 to {SCHEMA}") as lines:
        recipe = Recipe.from_json(data)
    today = PRESETS[data["name"]]  # which also transforms what norms give; a file means what it meant
    passes = [dataclasses.replace(c, norms=False) if isinstance(c, OnlineHadamard) else c for c in today.passes]
    assert recipe == dataclasses.replace(today, passes=tuple(passes)) and len(lines) == 1
    assert recipe.source == data["source"]


def test_every_renamed_field_of_a_file_is_read():
    with pytest.warns(SchemaUpgraded, match="renamed.json was upgraded") as lines:
        recipe = Recipe.read(DATA / "renamed.json")
    int4 = Format.parse("int4/group32/zero")
    gptq = GPTQ(int4, Format("int8"), lm_head=int4, lm_head_act=None, damp_percent=0.02, act_order=False, block_size=32)
    passes = (
        Untie(), FoldNorm(center=False), SmoothQuant(norms=False), Rotate(), OnlineHadamard(),
        PerTensorActivations(lm_head=True), QuantizeKV(4, sink_tokens=2), gptq, Fuse(),
    )  # fmt: skip
    assert recipe == Recipe("renamed", passes, (Rule("*.0.*", keep=True),)) and len(lines) == 1
    assert recipe.source == "every renamed field"


@pytest.mark.parametrize(
    "entry, config",
    [
        ({"pass": "CalibratePrefix", "rate": 0.5}, CalibratePrefix(lr=0.5)),
        ({"pass": "FineQuant", "sizes": [128, 64], "bits": 4.7}, FineQuant(group_sizes=(128, 64), bits=4.7)),
    ],
)
def test_renamed_fields_that_no_file_has(entry, config):
    with pytest.warns(SchemaUpgraded):
        assert Recipe.from_json({"schema": 1, "name": "old", "passes": [entry]}).passes == (config,)


def test_every_new_name_exists():
    known = {config.__name__: {field.name for field in dataclasses.fields(config)} for config in registered()}
    assert set(_PASSES.values()) <= set(known) and not set(_PASSES) & set(known)
    for name, renamed in _FIELDS.items():
        assert set(renamed.values()) <= known[name] and not set(renamed) & known[name], name


def test_an_upgraded_recipe_is_written_in_the_present_schema():
    data = upgrade(OLD_PRESETS[1])
    assert (data["schema"], data["qcompile"]) == (SCHEMA, VERSION) and stamp().items() <= data.items()
    assert Recipe.from_json(data).to_json() == PRESETS[data["name"]].to_json(), "read without a warning, and written"


def test_the_given_data_is_not_changed():
    data = {"schema": 1, "passes": [{"pass": "Smooth", "alpha": 0.5}]}
    before = json.dumps(data)
    with pytest.warns(SchemaUpgraded):
        upgraded_recipe(data, "it")["passes"].clear()
    assert json.dumps(data) == before
    now = {**stamp(), "passes": []}
    assert upgraded_recipe(now, "it") == now and upgraded_recipe(now, "it") is not now


@pytest.mark.parametrize(
    "data, words",
    [
        ({"schema": 7, "qcompile": "9.1"}, f"has schema 7, written by qcompile 9.1; qcompile {VERSION} reads 1 and 2"),
        ({"schema": 7}, "schema 7, by an unknown writer"),
        ({"schema": "2", "qcompile": "9.1"}, "schema '2'"),
        ({}, "schema None, by an unknown writer"),
    ],
)
def test_unknown_schemas_name_their_writer_and_the_fix(data, words, tmp_path):
    with pytest.raises(UnknownSchema, match=f"^its file .*{words}.*Fix: install the version"):
        needs_upgrade(data, "its file")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**data, "name": "x", "passes": []}))
    with pytest.raises(RecipeError, match=f"mine.json .*{words}"):
        Recipe.read(path)
