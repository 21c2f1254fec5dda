"""Checkpoints: those of schema 1 give the same outputs, and bad ones are refused before a model is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from zoo import build, example

import qcompile
from qcompile.checkpoint import stored_files, tensor_file
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.modules.kv_cache import KVCache
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.numerics.format import Format
from qcompile.passes import FoldNorm, Fuse, OnlineHadamard, Quantize, Rotate, Untie
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule
from qcompile.recipe.schema import SCHEMA, SchemaUpgraded
from qcompile.version import VERSION

DATA = Path(__file__).parents[1] / "data/schema1"
INT4 = Recipe("w4", (Quantize(Format.parse("int4/group32/zero"), None), Fuse()))


def saved_mlp(folder):
    """A quantized model, saved; its meta data; and the file that they are in."""
    model = build("mlp")
    qcompile.quantize(model, INT4, example=example("mlp"), progress=False)
    qcompile.save(model, folder)
    return model, json.loads((folder / "qcompile.json").read_text()), folder / "qcompile.json"


def test_a_module_of_schema_1_computes_the_same():
    expected = load_file(DATA / "expected.safetensors")
    with pytest.warns(SchemaUpgraded, match="mlp was upgraded from schema 1") as lines:
        model = qcompile.load(DATA / "mlp", build("mlp"))
    assert len(lines) == 1 and torch.allclose(model(expected["x"]), expected["y"], atol=1e-5)  # of another processor
    assert isinstance(model[0], QuantLinear)
    recipe = Recipe.from_json(model.qcompile_recipe)  # in the present schema: no second warning
    assert recipe.passes[0].damp_percent == 0.02


def test_a_decoder_of_schema_1_computes_the_same_with_its_cache():
    expected = load_file(DATA / "expected.safetensors")
    with pytest.warns(SchemaUpgraded, match="decoder was upgraded from schema 1") as lines:
        model = qcompile.load(DATA / "decoder")
    assert len(lines) == 1
    with torch.no_grad():
        out = model(expected["ids"])
    assert torch.allclose(out.logits, expected["logits"], atol=1e-4) and isinstance(out.past_key_values, KVCache)


def test_what_was_upgraded_is_saved_in_the_present_schema(tmp_path):
    with pytest.warns(SchemaUpgraded):
        model = qcompile.load(DATA / "mlp", build("mlp"))
    qcompile.save(model, tmp_path / "m")
    meta = json.loads((tmp_path / "m/qcompile.json").read_text())
    assert (meta["schema"], meta["qcompile"], meta["recipe"]["schema"]) == (SCHEMA, VERSION, SCHEMA)
    again, x = qcompile.load(tmp_path / "m", build("mlp")), torch.randn(3, 48)
    assert torch.equal(again(x), model(x))


def test_a_model_without_a_recipe(tmp_path):
    model, x = build("mlp"), torch.randn(3, 48)
    qcompile.save(model, tmp_path / "m")
    meta = json.loads((tmp_path / "m/qcompile.json").read_text())
    assert meta["recipe"] is None and meta["modules"] == {}
    loaded = qcompile.load(tmp_path / "m", build("mlp"))
    assert loaded.qcompile_recipe is None and torch.equal(loaded(x), model(x))
    # also one of schema 1
    (tmp_path / "m/qcompile.json").write_text(json.dumps({**meta, "schema": 1}))
    with pytest.warns(SchemaUpgraded):
        assert torch.equal(qcompile.load(tmp_path / "m", build("mlp"))(x), model(x))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"schema": 9, "qcompile": "3.5"}, "has schema 9, written by qcompile 3.5; .*Fix: install the version"),
        ({"schema": 9, "qcompile": None}, "has schema 9, by an unknown writer"),
        ({"schema": None}, "has schema None"),
    ],
)
def test_unknown_schemas_are_refused(change, words, tmp_path):
    _, meta, path = saved_mlp(tmp_path / "m")
    path.write_text(json.dumps({**meta, **change}))
    target = build("mlp")
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        qcompile.load(tmp_path / "m", target)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", '{"schema": 2'])
def test_damaged_meta_data_are_refused(text, tmp_path):
    _, _, path = saved_mlp(tmp_path / "m")
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match="qcompile.json is damaged .*Fix: save the model again"):
        qcompile.load(tmp_path / "m", build("mlp"))


@pytest.mark.parametrize("text", ["[]", "3", '"schema"'])
def test_foreign_meta_data_are_refused(text, tmp_path):
    _, _, path = saved_mlp(tmp_path / "m")
    path.write_text(text)
    with pytest.raises(CheckpointError, match="is not of a checkpoint. Fix: name a folder"):
        qcompile.load(tmp_path / "m", build("mlp"))


@pytest.mark.parametrize("key", ["recipe", "class", "shared", "modules"])
def test_missing_keys_are_named(key, tmp_path):
    _, meta, path = saved_mlp(tmp_path / "m")
    del meta[key]
    path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=f"damaged: it has no {key}"):
        qcompile.load(tmp_path / "m", build("mlp"))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no qcompile.json. Fix: name a folder"):
        qcompile.load(tmp_path, build("mlp"))
    saved_mlp(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read .*Fix: save"):
        qcompile.load(tmp_path / "m", build("mlp"))


def test_a_class_that_only_the_caller_has_needs_the_model(tmp_path):
    saved_mlp(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no config.json. Fix: pass the float model"):
        qcompile.load(tmp_path / "m")
    shutil.copytree(DATA / "decoder", tmp_path / "d")
    meta = json.loads((tmp_path / "d/qcompile.json").read_text())
    (tmp_path / "d/qcompile.json").write_text(json.dumps({**meta, "class": "OnlyMine"}))
    with pytest.warns(SchemaUpgraded), pytest.raises(CheckpointError, match="no class OnlyMine. Fix: pass the float"):
        qcompile.load(tmp_path / "d")


def test_another_model_is_refused_unchanged(tmp_path):
    saved_mlp(tmp_path / "m")
    target = build("mlp").append(torch.nn.Linear(10, 3))
    keys = list(target.state_dict())
    with pytest.raises(CheckpointError, match="holds another model.*Fix: pass the float model that was quantized"):
        qcompile.load(tmp_path / "m", target)
    assert list(target.state_dict()) == keys


def test_tied_tensors_are_saved_once(tmp_path):
    first = torch.nn.Linear(8, 8, bias=False)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Linear(8, 8, bias=False))
    model[2].weight = first.weight
    qcompile.save(model, tmp_path / "m")
    assert list(load_file(tmp_path / "m/model.safetensors")) == ["0.weight"]
    assert json.loads((tmp_path / "m/qcompile.json").read_text())["shared"] == {"2.weight": "0.weight"}
    apart = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 8, bias=False))
    loaded, x = qcompile.load(tmp_path / "m", apart), torch.randn(2, 8)
    assert torch.equal(loaded(x), model(x))


def test_a_rotated_float_linear_that_stores_its_weight_as_k_n(tmp_path):
    """The size of its Hadamard transform is not read off the weight, whose layout is the owner's."""
    model, inputs = build("gpt2"), example("gpt2")
    passes = (Untie(), FoldNorm(), Rotate(), OnlineHadamard(), Quantize(), Fuse())
    recipe = Recipe("x", passes, (Rule("*mlp.c_proj*", keep=True),))
    qcompile.quantize(model, recipe, [inputs], progress=False)
    rotated = [m for m in model.modules() if isinstance(m, RotatedLinear)]
    assert rotated and all(m.inner.weight.shape[0] == len(m.signs) != m.inner.weight.shape[1] for m in rotated)
    qcompile.save(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(qcompile.load(tmp_path / "m")(**inputs).logits, model(**inputs).logits)


def quantized(name="llama", recipe="int8"):
    model = build(name)
    qcompile.quantize(model, recipe, [example(name)], progress=False)
    return model


@pytest.mark.parametrize("recipe", ["int8", "w4a8", "w4a16", "fp8", "w4a4-rotated", "exact"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_save_and_load(name, recipe, tmp_path):
    model = quantized(name, recipe)
    qcompile.save(model, tmp_path / "m")
    again = qcompile.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(**example(name))[0], model(**example(name))[0])
    assert json.loads((tmp_path / "m/qcompile.json").read_text())["recipe"]["name"] == recipe


def test_same_input_same_bytes(tmp_path):
    for part in "ab":
        qcompile.save(quantized("llama", "w4a4-rotated"), tmp_path / part)
    assert (tmp_path / "a/qcompile.safetensors").read_bytes() == (tmp_path / "b/qcompile.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "schema", "other model"])
def test_damaged_checkpoints(damage, tmp_path):
    qcompile.save(quantized(), tmp_path / "m")
    file, meta = tmp_path / "m/qcompile.safetensors", tmp_path / "m/qcompile.json"
    target = None
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "foreign":
        file.write_bytes(b"not a tensor file at all")
    elif damage == "missing":
        meta.unlink()
    elif damage == "schema":
        meta.write_text('{"schema": 77}')
    else:
        target = build("opt")
        before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError, match="m"):
        qcompile.load(tmp_path / "m", target)
    if target is not None:
        after = target.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_full_folder_is_refused_and_nothing_is_half_written(tmp_path, monkeypatch):
    model = quantized()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        qcompile.save(model, tmp_path / "full")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write_shard", full_disk)
    with pytest.raises(CheckpointError, match="new cannot be written .*No space left on device.*Fix: free some space"):
        qcompile.save(model, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["full"] and os.listdir(tmp_path / "full") == ["x"]


@pytest.mark.parametrize("form", ["int4/group32/bf16", "int8/row/f16", "int4/group32/floatzero/f16", "fp8/row/bf16"])
def test_scales_are_stored_in_the_dtype_of_their_format(tmp_path, form):
    model = build("mlp")
    recipe = Recipe("w", (Quantize(Format.parse(form), None, lm_head=None), Fuse()))
    qcompile.quantize(model, recipe, example=example("mlp"), progress=False)
    qcompile.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    again = qcompile.load(tmp_path / "out", build("mlp"))
    scales = [name for name in stored if name.endswith(".scale")]
    assert scales and {stored[name].dtype for name in scales} == {Format.parse(form).scale_dtype}
    for name, module in again.named_modules():
        if isinstance(module, QuantLinear):
            assert str(module.format) == form and torch.equal(module.weight, model.get_submodule(name).weight)
    half = again.half()  # a cast leaves scales as they are
    assert {m.scale.dtype for m in half.modules() if isinstance(m, QuantLinear)} == {Format.parse(form).scale_dtype}


@pytest.mark.parametrize("recipe", ["w4a16", "int8"])
def test_a_folder_is_read_in_parts(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(stored_files, "SMALL", 0)
    monkeypatch.setattr(stored_files.stored_tensors, "__defaults__", (0,))
    model = build("llama")
    qcompile.quantize(model, recipe, example=example("llama"), progress=False)
    qcompile.save(model, tmp_path / "q")
    parts = qcompile.load(tmp_path / "q", stream=True)
    tensors = [*parts.parameters(), *parts.buffers()]
    assert tensors and all(isinstance(tensor, StoredTensor) for tensor in tensors)
    with torch.no_grad():
        assert torch.equal(parts(**example("llama")).logits, model(**example("llama")).logits)
    qcompile.save(parts, tmp_path / "again")
    for file in (tmp_path / "q").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_folder_in_parts_is_checked(tmp_path):
    model = build("llama")
    qcompile.quantize(model, "int8", example=example("llama"), progress=False)
    qcompile.save(model, tmp_path / "q")
    file = tmp_path / "q/qcompile.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        qcompile.load(tmp_path / "q", stream=True)
