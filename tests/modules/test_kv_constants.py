"""Constants of the cache: from calibration into the model, and through checkpoints and casts."""

from __future__ import annotations

import pytest
import torch
from zoo import build

import qcompile
from qcompile.modules.kv_constants import Centers, Prefix, Scales
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError


def test_centers_are_the_mean_keys_of_the_calibration_and_survive_saving(tmp_path):
    model, ids = build("qwen2"), torch.randint(3, 128, (4, 20))  # its keys have biases, and two heads of four
    with torch.no_grad():
        keys = model(input_ids=ids, use_cache=True).past_key_values.layers[1].keys
    recipe = Recipe("kv", (QuantizeKV(4, center=True), Quantize(Format("int8"), None), Fuse()))
    qcompile.quantize(model, recipe, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], progress=False)
    centers = model.qcompile_centers.all
    assert [tuple(c.shape) for c in centers] == [(2, 16)] * 2
    assert torch.allclose(centers[1], keys[:, :, 4:].mean((0, 2)), atol=1e-5)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        qcompile.save(model, tmp_path / "m")
        assert torch.equal(qcompile.load(tmp_path / "m")(input_ids=ids).logits, want)
    with pytest.raises(RecipeError, match="needs calibration data for QuantizeKV"):
        qcompile.quantize(build("qwen2"), recipe, progress=False)


def test_static_scales_survive_saving(tmp_path):
    model, ids = build("qwen2"), torch.randint(3, 128, (4, 20))
    recipe = Recipe("kv", (QuantizeKV(8, static=True), Quantize(Format("int8"), None), Fuse()))
    qcompile.quantize(model, recipe, [{"input_ids": ids}], progress=False)
    assert [tuple(part.shape) for pair in model.qcompile_scales.all for part in pair] == [(2, 16)] * 4
    done = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert done.past_key_values.nbytes == 2 * 2 * 2 * 16 * 4 * 24  # layers, keys and values, heads, channels, tokens
    qcompile.save(model, tmp_path / "m")
    again = qcompile.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(RecipeError, match="needs calibration data for QuantizeKV"):
        qcompile.quantize(build("qwen2"), recipe, progress=False)


def test_scales_stay_float32_in_a_model_that_is_cast():
    scales = Scales([(torch.full((2, 16), 0.1), torch.full((2, 16), 1e-9))])
    scales.to(torch.float16)
    assert all((part == want).all() for part, want in zip(scales.all[0], (0.1, torch.tensor(1e-9)), strict=True))


def test_a_prefix_starts_the_rows_that_begin_with_it_and_go_on():
    keys = torch.randn(1, 2, 3, 4)
    prefix = Prefix(torch.tensor([5, 6, 7]), [(keys, 2 * keys)], torch.randn(1, 3, 11))
    assert prefix.starts(torch.tensor([[5, 6, 7, 1], [5, 6, 7, 2]]))
    assert not prefix.starts(torch.tensor([[5, 6, 7, 1], [5, 6, 8, 2]])), "one row of the batch is another text"
    assert not prefix.starts(torch.tensor([[5, 6, 7]])), "nothing follows"
    (found,), (values,) = prefix.caches(2)
    assert found.shape == (2, 2, 3, 4) and torch.equal(found[1], keys[0]) and torch.equal(values[0], 2 * keys[0])


@pytest.mark.parametrize(
    "constants",
    [
        Prefix(
            torch.tensor([1, 2]), [(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4)) for _ in "ab"], torch.ones(1, 2, 9)
        ),
        Centers([torch.ones(2, 4) for _ in "ab"]),
        Scales([(torch.ones(2, 4), torch.ones(1, 4)) for _ in "ab"]),
    ],
    ids=lambda constants: type(constants).__name__,
)
def test_empty_ones_take_the_tensors_of_the_saved(constants):
    shapes = {name: list(tensor.shape) for name, tensor in constants.named_buffers()}
    empty = type(constants).empty(shapes)
    empty.load_state_dict(constants.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(empty.buffers(), constants.buffers(), strict=True))
