"""Checkpoints: those of schema 1 give the same outputs, and bad ones are refused before a model is touched."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from zoo import brief, build, example

import qcompile
from qcompile.checkpoint import save_load
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.modules.kv_cache import KVCache
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.numerics.format import Format
from qcompile.passes import FoldNorm, Fuse, OnlineHadamard, Quantize, QuantizeKV, Rotate, Untie
from qcompile.pipeline.presets import PRESETS
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


# -- what was quantized comes back ---------------------------------------------------------------------


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
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "schema", "other model"])
def test_damaged_checkpoints(damage, tmp_path):
    qcompile.save(quantized(), tmp_path / "m")
    file, meta = tmp_path / "m/model.safetensors", tmp_path / "m/qcompile.json"
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

    monkeypatch.setattr(save_load, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="new cannot be written .*No space left on device.*Fix: free some space"):
        qcompile.save(model, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["full"] and os.listdir(tmp_path / "full") == ["x"]


# -- saved is what ran -----------------------------------------------------------------------------


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", ["int8", "w4a16-rotated"])
def test_a_model_that_was_cast_computes_the_same(recipe, dtype, tmp_path):
    """Casting rounds the tables of positions, which no state_dict has."""
    model, inputs = build("llama").to(dtype), example("llama")
    qcompile.quantize(model, recipe, [inputs], progress=False)
    qcompile.save(model, tmp_path / "m")
    again = qcompile.load(tmp_path / "m")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    buffers = dict(model.named_buffers())
    assert all(b.dtype == buffers[n].dtype and torch.equal(b, buffers[n]) for n, b in again.named_buffers())
    filled = qcompile.load(tmp_path / "m", build("llama"))
    assert torch.equal(logits(filled, inputs), logits(model, inputs))


SMALL = dict(vocab_size=128, num_attention_heads=4, intermediate_size=128, max_position_embeddings=64)
OTHERS = {
    "positions that are a buffer": lambda: tf.XGLMForCausalLM(
        tf.XGLMConfig(
            vocab_size=128, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, max_position_embeddings=64
        )
    ),
    "norms without a gain": lambda: tf.DiffLlamaForCausalLM(
        tf.DiffLlamaConfig(hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, **SMALL)
    ),
    "layers that are shared": lambda: tf.AlbertModel(
        tf.AlbertConfig(hidden_size=64, embedding_size=32, num_hidden_layers=2, **SMALL)
    ),
}


@pytest.mark.parametrize("recipe", ["w8a16", "int8-rotated"])
@pytest.mark.parametrize("name", OTHERS)
def test_models_with(name, recipe, tmp_path):
    torch.manual_seed(0)
    model, inputs = OTHERS[name]().eval(), example("llama")
    qcompile.quantize(model, recipe, [inputs], progress=False)
    qcompile.save(model, tmp_path / "m")
    assert torch.equal(logits(qcompile.load(tmp_path / "m"), inputs), logits(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [name for name in PRESETS if name != "w4a16-finequant"])
def test_every_preset(recipe, dtype, tmp_path):
    model, inputs = build("llama").to(dtype), example("llama")
    qcompile.quantize(model, brief(PRESETS[recipe]), [inputs], progress=False)
    qcompile.save(model, tmp_path / "m")
    assert torch.equal(logits(qcompile.load(tmp_path / "m"), inputs), logits(model, inputs))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_copies_pickles_and_state_dicts(name, tmp_path):
    model, inputs = build(name), example(name)
    recipe = Recipe("x", (Untie(), FoldNorm(), Rotate(), OnlineHadamard(), QuantizeKV(8), *INT4.passes))
    qcompile.quantize(model, recipe, [inputs], progress=False)
    expected = logits(model, inputs)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))]
    torch.save(model, tmp_path / "model.pt")
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for again in copies:
        assert torch.equal(logits(again, inputs), expected) and again.state_dict().keys() == model.state_dict().keys()
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert not {id(t) for t in again.buffers()} & {id(t) for t in model.buffers()}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copies[0]
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name_, buffer in model.named_buffers():  # computed ones are in no state_dict
        if name_ not in model.state_dict():
            other.get_buffer(name_).copy_(buffer)
    assert torch.equal(logits(other, inputs), expected)


def test_a_wrapped_model_is_saved_without_its_wrapper(tmp_path):
    model, inputs = quantized("llama", "w8a16"), example("llama")
    qcompile.save(torch.compile(model, backend="eager"), tmp_path / "m")
    wrapped = torch.compile(build("llama"), backend="eager")
    assert qcompile.load(tmp_path / "m", wrapped) is wrapped
    for again in (qcompile.load(tmp_path / "m"), wrapped._orig_mod):
        assert torch.equal(logits(again, inputs), logits(model, inputs))


# -- any damage is refused, or does no harm ----------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder, and what it computes: codes of two formats, a float layer, a norm, tied biases."""
    folder = tmp_path_factory.mktemp("whole") / "m"
    model = fuzzed_model()
    dual = Format.parse("int4/group16/zero/dual")
    recipe = Recipe("w4", INT4.passes, (Rule("4.weight", keep=True), Rule("2.weight", weight=dual)))
    qcompile.quantize(model, recipe, example=example("mlp"), progress=False)
    qcompile.save(model, folder)
    return folder, model(example("mlp")["input"])


def fuzzed_model():
    return build("mlp")


def try_to_load(files, folder, expected, *, values_may_differ=False):
    """Load a folder of files into a model, which ends as the same model, or refused and unchanged."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    target = fuzzed_model()
    before = {name: (tensor, tensor.clone()) for name, tensor in target.state_dict(keep_vars=True).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SchemaUpgraded)
        try:
            loaded = qcompile.load(folder, target)
        except ValueError as error:
            assert "\n" not in str(error) and "Fix: " in str(error)
            after = target.state_dict(keep_vars=True)
            assert after.keys() == before.keys()
            assert all(after[n] is same and torch.equal(same, content) for n, (same, content) in before.items())
            return
    output = loaded(example("mlp")["input"])
    assert values_may_differ or torch.equal(output, expected)


FUZZ = settings(
    deadline=None, max_examples=80, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
NAMES = ["model.safetensors", "qcompile.json"]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
ANY_JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@FUZZ
@given(data=st.data())
def test_flipped_cut_and_added_bytes(data, whole, tmp_path):
    folder, expected = whole
    files = {name: (folder / name).read_bytes() for name in NAMES}
    name = data.draw(st.sampled_from(NAMES))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        if not content:
            break
        near_the_front = st.integers(0, min(len(content), 1500) - 1)  # where headers are
        at = data.draw(near_the_front | st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "add", "drop"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "add":
            content[at:at] = data.draw(st.binary(max_size=9))
        else:
            del content[at : at + data.draw(st.integers(1, 9))]
    try_to_load({**files, name: bytes(content)}, tmp_path / "m", expected)


def places_of(data, path=()):
    """The path of every value inside plain data."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places_of(value, (*path, key))


def with_value(data, path, value):
    if not path:
        return value
    copied = copy.copy(data)
    copied[path[0]] = with_value(data[path[0]], path[1:], value)
    return copied


@pytest.mark.parametrize("digest", [True, False])
@FUZZ
@given(data=st.data())
def test_other_values_in_the_description(digest, data, whole, tmp_path):
    """Also in a folder that was written without digests, where legal values cannot be told from others."""
    folder, expected = whole
    meta = json.loads((folder / "qcompile.json").read_text())
    if not digest:
        meta = {key: meta[key] for key in ("schema", "qcompile", "recipe", "class", "shared", "modules")}
    path = data.draw(st.sampled_from(list(places_of(meta))))
    value = data.draw(ANY_JSON | st.sampled_from(["int8", "int4/group16", "RMSNorm", "Alias", [], {}, 10**30, -1, 0.5]))
    text = json.dumps(with_value(meta, path, value))
    files = {"model.safetensors": (folder / "model.safetensors").read_bytes(), "qcompile.json": text.encode()}
    try_to_load(files, tmp_path / "m", expected, values_may_differ=not digest)


@FUZZ
@given(data=st.data())
def test_other_tensors_in_the_file(data, whole, tmp_path):
    """Written again as a whole file: of legal values only the digests know that they are others."""
    folder, expected = whole
    tensors = load_file(folder / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool]))
    changes = {
        "one value": lambda t: t.flatten().index_fill(0, torch.tensor([t.numel() // 2]), 1).view(t.shape),
        "NaN": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t + 1,
        "zeros": torch.zeros_like,
        "negative": lambda t: -t if t.is_floating_point() else ~t,
        "dtype": lambda t: t.to(dtype),
        "shape": lambda t: t[..., :-1].contiguous(),
        "more": lambda t: t[None],
        "missing": lambda t: None,
    }
    with_digests = data.draw(st.booleans())
    changed = changes[data.draw(st.sampled_from(sorted(changes)))](tensors[name])
    tensors = {n: t for n, t in {**tensors, name: changed}.items() if t is not None}
    meta = json.loads((folder / "qcompile.json").read_text())
    if not with_digests:
        meta = {key: meta[key] for key in ("schema", "qcompile", "recipe", "class", "shared", "modules")}
    files = {"model.safetensors": save_bytes(tensors), "qcompile.json": json.dumps(meta).encode()}
    try_to_load(files, tmp_path / "m", expected, values_may_differ=not with_digests)


@pytest.mark.slow
def test_every_flipped_bit_of_codes_and_scales_is_noticed(whole, tmp_path):
    folder, _ = whole
    content = (folder / "model.safetensors").read_bytes()
    shutil.copytree(folder, tmp_path / "m")
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content), 97):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "m/model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            qcompile.load(tmp_path / "m", fuzzed_model())
