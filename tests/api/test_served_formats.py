"""Recipes that a served format cannot say are refused before work; presets fit the model; siblings have one format."""

from __future__ import annotations

import pytest
import torch
from served_models import FLOAT_LOGITS, decoder, quantized, recipe
from zoo import build

from qcompile.api.served_formats import check_recipe, check_siblings, fitted, shared_inputs
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.passes import FoldNorm, Fuse, IntactKV, LoRC, OnlineHadamard, PerTensorActivations, Quantize, QuantizeKV
from qcompile.pipeline.presets import PRESETS
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

W4 = Quantize("int4/group32", None, keep_lm_head=True)


@pytest.mark.parametrize(
    "passes, words",
    [
        ((OnlineHadamard(), W4, Fuse()), "an online Hadamard transform, which is not stored.*Fix: drop OnlineHadamard"),
        ((W4, Fuse(), LoRC()), "a low-rank correction beside weights.*Fix: drop LoRC"),
        ((IntactKV(prefix=(1, 2)), W4, Fuse()), "keys and values of a prefix.*Fix: drop IntactKV"),
        ((QuantizeKV(4), W4, Fuse()), "a key/value cache of ours.*Fix: drop QuantizeKV"),
        ((PerTensorActivations(), W4, Fuse()), "one scale for all tokens.*Fix: drop PerTensorActivations"),
        ((FoldNorm(),), "quantizes no weights.*Fix: use one that does"),
        ((Quantize("int4/group96", None), Fuse()), r"mlp.gate_proj|self_attn.q_proj: a last group of 32 of 96 columns"),
        ((Quantize("int4/group32", None, lm_head="fp4/row"), Fuse()), "lm_head: e2m1 codes"),
    ],
)
def test_recipes_are_refused_before_anything_is_quantized(passes, words):
    with pytest.raises(ExportError, match=words):
        check_recipe(Recipe("r", passes), decoder(), "compressed-tensors")


def test_what_a_rule_says_of_a_site_counts():
    ragged = (Quantize("int4/group96", None, keep_lm_head=True), Fuse())
    check_recipe(Recipe("r", ragged, (Rule("*", weight="int4/group64"),)), decoder(), "compressed-tensors")
    check_recipe(Recipe("r", ragged, (Rule("*", keep=True),)), decoder(), "compressed-tensors")
    with pytest.raises(ExportError, match="down_proj: zero points that are no integers"):
        rules = (Rule("*.down_proj.*", weight="int4/group64/floatzero"), Rule("*", keep=True))
        check_recipe(Recipe("r", ragged, rules), decoder(), "compressed-tensors")


def test_a_served_preset_takes_groups_that_divide_and_scales_of_the_model():
    preset = PRESETS["serve-w4a16"]
    assert fitted(preset, decoder(torch.bfloat16)) == preset
    narrow = decoder(torch.float16)
    narrow.model.layers[0].mlp.down_proj = torch.nn.Linear(192, 128).half()
    assert str(fitted(preset, narrow).passes[0].weight) == "int4/group64/f16"
    assert str(fitted(PRESETS["serve-int8"], narrow).passes[2].weight) == "int8/row/f16"
    assert fitted(PRESETS["gguf-q4_0"], narrow) == PRESETS["gguf-q4_0"]
    own = recipe("int4/group128")  # is somebody's own
    assert fitted(own, narrow) is own


def test_linears_that_read_one_value_are_found_by_the_values():
    found = [sorted(path.rpartition(".")[2] for path in paths) for paths in shared_inputs(quantized("int4/group32"))]
    assert sorted(found) == [["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"]]


def test_siblings_in_two_formats_are_refused_and_others_may_differ():
    rules = (Rule("*.up_proj.*", weight="int4/group64"), *FLOAT_LOGITS)
    with pytest.raises(ExportError, match="up_proj: int4/group64 beside int4/group32 of .*gate_proj.*Fix: give both"):
        check_siblings(quantized("int4/group32", rules=rules), "compressed-tensors")
    rules = (Rule("*.down_proj.*", weight="int8/row"), *FLOAT_LOGITS)
    check_siblings(quantized("int4/group32", rules=rules), "compressed-tensors")
    check_siblings(quantized("int4/group32", rules=()), "compressed-tensors")


def test_groups_are_fitted_to_experts_too():
    model = build("mixtral").bfloat16()
    assert {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)} == {64}
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.down_proj = torch.nn.Parameter(torch.randn(4, 64, 96).bfloat16())
    assert str(fitted(PRESETS["serve-w4a16"], model).passes[0].weight) == "int4/group32/bf16"
