"""Which models have a cache that a recipe's passes can serve."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from zoo import SIZES, build, example

import qcompile
from qcompile.api import quantize as quantize_module
from qcompile.passes import Fuse, IntactKV, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError


def test_a_model_without_a_cache_is_refused_unchanged():
    model, inputs = build("vit"), example("vit")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RecipeError, match="puts nothing into past_key_values"):
        qcompile.quantize(model, Recipe("kv", (QuantizeKV(), Quantize(), Fuse())), [inputs], progress=False)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "bert"])  # takes no cache; fills one that nobody reads again
def test_an_optional_cache_is_skipped_where_a_model_has_none(name):
    model, inputs = build(name), example(name)
    recipe = Recipe("kv", (QuantizeKV(8, static=True, optional=True), Quantize(), Fuse()))
    report = qcompile.quantize(model, recipe, [inputs], progress=False)
    assert [entry.name for entry in report.passes] == ["Quantize", "Fuse", "QuantizeKV"]
    assert "stays float" in report.passes[-1].skipped[0].reason and not hasattr(model, "qcompile_calls")
    assert Recipe.from_json(model.qcompile_recipe).passes == recipe.passes[1:]


def _hybrid():
    """Half of its layers are convolutions, which cache something else than keys and values."""
    return tf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])


def _sharing():
    """The last two of its layers read the keys and values of those before."""
    return tf.Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 4}, head_dim=16, layer_types=["full_attention"] * 4, num_kv_shared_layers=2,
        vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config, why",
    [
        (_hybrid, "keys and values only"),
        pytest.param(_sharing, "4 attentions, the cache 2 layers", marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_not_those_of_the_cache(config, why):
    """Refused before any work, or skipped."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config()).eval()
    data = [{"input_ids": torch.randint(3, 128, (2, 8))}]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecipeError, match=f"QuantizeKV: .*{why}"):
        patch.setattr(quantize_module, "run", None)
        qcompile.quantize(model, Recipe("kv", (QuantizeKV(8, static=True), Quantize(), Fuse())), data, progress=False)
    optional = Recipe("kv", (QuantizeKV(8, static=True, optional=True), Quantize(), Fuse()))
    report = qcompile.quantize(model, optional, data, progress=False)
    assert why in report.passes[-1].skipped[0].reason and not hasattr(model, "qcompile_calls")


def test_static_scales_do_not_go_with_a_float_prefix():
    model = build("llama")
    recipe = Recipe("kv", (IntactKV((1,)), QuantizeKV(8, static=True), Quantize(), Fuse()))
    with pytest.raises(RecipeError, match="IntactKV keeps its tokens float"):
        qcompile.quantize(model, recipe, [example("llama")], progress=False)
