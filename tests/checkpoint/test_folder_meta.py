"""qcompile.json: what is written is read, and every changed or missing part is noticed."""

from __future__ import annotations

import json

import pytest

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_meta import FolderMeta, content_digest, read_meta
from qcompile.pipeline.presets import PRESETS

META = FolderMeta(
    PRESETS["int8"].to_json(), "Model", {"b": "a"}, {"fc": {"kind": "RMSNorm"}}, frozenset({"t"}), {"rope": {"n": 3}},
    {"": {"_attn_implementation": "eager"}}, {"a": "00000000"}, {"config.json": content_digest({"a": 1})},
)  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    META.write(tmp_path)
    assert read_meta(tmp_path) == META and read_meta(tmp_path).parsed_recipe() == PRESETS["int8"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("recipe", None), ("class", "Other"), ("shared", {}), ("modules", {}), ("computed", []), ("scalars", {}),
     ("implementations", {}), ("tensors", {"a": "00000001"}), ("files", {}), ("digest", "0"), ("new", 1)],
)  # fmt: skip
def test_every_change_is_noticed(key, value, tmp_path):
    META.write(tmp_path)
    path = tmp_path / "qcompile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match="was changed: its content is not what its digest says"):
        read_meta(tmp_path)


@pytest.mark.parametrize("key", ["computed", "scalars", "implementations", "tensors", "files", "digest"])
def test_no_key_can_be_dropped(key, tmp_path):
    META.write(tmp_path)
    path = tmp_path / "qcompile.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(CheckpointError, match="was changed"):
        read_meta(tmp_path)


@pytest.mark.parametrize("key", ["recipe", "class", "shared", "modules", "computed", "scalars", "implementations"])
@pytest.mark.parametrize("value", [3, [3], {"a": 3}, {"a": {"b": []}}, {"a": {"b": None}}])
def test_wrong_types_are_named(key, value, tmp_path):
    legal = {("recipe", str({"a": 3})), ("recipe", str({"a": {"b": []}})), ("recipe", str({"a": {"b": None}})),
             ("modules", str({"a": {"b": []}})), ("modules", str({"a": {"b": None}}))}  # fmt: skip
    if (key, str(value)) in legal:
        return
    data = {"schema": 2, "recipe": None, "class": "M", "shared": {}, "modules": {}, key: value}
    (tmp_path / "qcompile.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"damaged: {key} is of a wrong type"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    "recipe", [{"schema": 2}, {"schema": 2, "name": 1, "passes": 3}, {"schema": 2, "passes": [[]]}]
)
def test_what_is_no_recipe_is_refused(recipe):
    with pytest.raises(CheckpointError, match="recipe in qcompile.json cannot be read"):
        FolderMeta(recipe, "M", {}, {}).parsed_recipe()


def test_files_beside_it_are_compared_by_content(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n "a": 1}')
    META.check_file(path)
    path.write_text('{"a": 2}')
    with pytest.raises(CheckpointError, match="config.json was changed"):
        META.check_file(path)
    path.write_text('{"a": 2, "a": 1}')
    with pytest.raises(CheckpointError, match="config.json is damaged .*stands twice"):
        META.check_file(path)
