"""Which models have a cache that a recipe's passes can serve."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from zoo import SIZES, build, example

import qcompile
from qcompile.api import rewrite_model as rewriting
from qcompile.modules.generation_hooks import GenerationHooks, hooks_of
from qcompile.modules.generation_plan import DoesNotFit, GenerationPlan, with_own_prefix
from qcompile.modules.kv_constants import Centers, Scales
from qcompile.passes import Fuse, IntactKV, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import KVConstants, PassReport, PrefixValues, Report
from qcompile.recipe.rule import RecipeError


def test_a_model_without_a_cache_is_refused_unchanged():
    model, inputs = build("vit"), example("vit")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RecipeError, match="puts nothing into (cache|past_key_values)"):
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
        (_hybrid, "is a hybrid: 1 of its 2 layers cache the state of a convolution"),
        pytest.param(_sharing, "4 attentions, the cache 2 layers", marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_not_those_of_the_cache(config, why):
    """Refused before any work, or skipped."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config()).eval()
    data = [{"input_ids": torch.randint(3, 128, (2, 8))}]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecipeError, match=f"QuantizeKV: .*{why}"):
        patch.setattr(rewriting, "run", None)
        qcompile.quantize(model, Recipe("kv", (QuantizeKV(8, static=True), Quantize(), Fuse())), data, progress=False)
    optional = Recipe("kv", (QuantizeKV(8, static=True, optional=True), Quantize(), Fuse()))
    report = qcompile.quantize(model, optional, data, progress=False)
    assert why in report.passes[-1].skipped[0].reason and not hasattr(model, "qcompile_calls")


def test_static_scales_do_not_go_with_a_float_prefix():
    model = build("llama")
    recipe = Recipe("kv", (IntactKV((1,)), QuantizeKV(8, static=True), Quantize(), Fuse()))
    with pytest.raises(RecipeError, match="IntactKV keeps its tokens float"):
        qcompile.quantize(model, recipe, [example("llama")], progress=False)


def fit(name, *passes, attentions=2):
    model = build(name)
    return model, GenerationPlan.fit(model, Recipe("kv", passes), (), example(name), attentions)


def test_a_plan_without_a_cache_calls_no_model(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model, "forward", None)
    recipe = Recipe("x", (Quantize(), Fuse()))
    plan = GenerationPlan.fit(model, recipe, (), {}, 2)
    assert plan.recipe is recipe and plan.heads == [] and plan.skipped is None
    plan.finish(Report("x"))
    plan.attach(model)
    assert not hasattr(model, "qcompile_calls") and hooks_of(model).config is None


@pytest.mark.parametrize("name,heads", [("llama", 2), ("gpt2", 4)])
def test_heads_are_those_that_are_cached(name, heads):
    model, plan = fit(name, QuantizeKV(8))
    assert plan.heads == [(heads, heads)] * 2 and plan.recipe.passes == (QuantizeKV(8),)


@pytest.mark.parametrize(
    "passes,fix",
    [
        ((IntactKV((1,)),), "drop IntactKV"),
        ((QuantizeKV(8, static=True),), "use static=False"),
        ((QuantizeKV(4, center=True),), "use center=False"),
    ],
)
def test_constants_need_an_attention_for_each_layer(passes, fix):
    with pytest.raises(DoesNotFit, match=f"the graph has 3 attentions, the cache 2 layers. Fix: {fix}") as caught:
        fit("llama", *passes, attentions=3)
    assert caught.value.reason == "the graph has 3 attentions, the cache 2 layers"
    assert fit("llama", QuantizeKV(8), attentions=3)[1].heads  # per-token scales need none


def test_an_optional_cache_that_does_not_fit_leaves_the_recipe():
    optional, quantize = QuantizeKV(8, static=True, optional=True), Quantize()
    _, plan = fit("llama", optional, quantize, attentions=3)
    assert plan.recipe.passes == (quantize,) and plan.heads == []
    (place,) = plan.skipped.skipped
    assert place.site == "cache" and place.reason == "stays float: the graph has 3 attentions, the cache 2 layers"


def report_of(constants):
    return Report("kv", passes=[PassReport("QuantizeKV", constants=constants)])


def repeated(*shape):
    """[H, D] of two key/value heads, each repeated for two query heads."""
    return torch.randn(*shape).repeat_interleave(2, -2)


def test_constants_are_those_of_the_cached_heads():
    model, plan = fit("llama", QuantizeKV(4, center=True))
    means = tuple(repeated(2, 16) for _ in range(2))
    plan.finish(report_of(KVConstants(centers=means)))
    assert isinstance(plan.constants, Centers)
    assert all(torch.equal(own, mean[::2]) for own, mean in zip(plan.constants.all, means, strict=True))
    _, plan = fit("llama", QuantizeKV(8, static=True))
    keys, values = (tuple(repeated(2, 16).abs() for _ in range(2)) for _ in range(2))
    plan.finish(report_of(KVConstants(key_scales=keys, value_scales=values)))
    assert isinstance(plan.constants, Scales)
    for (k, v), key, value in zip(plan.constants.all, keys, values, strict=True):
        assert torch.equal(k, key[::2]) and torch.equal(v, value[::2])
    plan.attach(model)
    hooks = hooks_of(model)
    assert isinstance(hooks, GenerationHooks) and hooks.scales is plan.constants and hooks.centers is None


def test_a_prefix_is_kept_for_the_cached_heads():
    _, plan = fit("llama", IntactKV((1,)))
    layers = [tuple(torch.randn(1, 2, 1, 16).repeat_interleave(2, 1) for _ in range(2)) for _ in range(2)]
    values = PrefixValues(torch.tensor([1]), *zip(*layers, strict=True), torch.randn(1, 1, 128))
    plan.finish(report_of(KVConstants(prefix=values)))
    assert plan.prefix.ids.tolist() == [1]
    for (keys, own), (key, value) in zip(zip(*plan.prefix.caches(1), strict=True), layers, strict=True):
        assert torch.equal(keys, key[:, ::2]) and torch.equal(own, value[:, ::2])


def test_the_models_own_first_token_is_the_prefix():
    model, named = build("llama"), Recipe("x", (IntactKV((7,)),))
    assert with_own_prefix(Recipe("x", (IntactKV(),)), model).passes == (IntactKV((1,)),)
    assert with_own_prefix(named, model) == named
    model.config.bos_token_id = None
    assert with_own_prefix(Recipe("x", (IntactKV(),)), model).passes == (IntactKV(),)
