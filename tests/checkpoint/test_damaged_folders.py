"""Any damage of a folder is refused before a model is touched, or does no harm."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from zoo import build, example

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule
from qcompile.recipe.schema import SchemaUpgraded

INT4 = Recipe("w4", (Quantize(Format.parse("int4/group32/zero"), None), Fuse()))


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
