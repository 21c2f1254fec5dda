"""What no served format can say is refused with the place and the fix."""

from __future__ import annotations

import copy

import pytest
import torch
from served_models import FLOAT_LOGITS, decoder, quantized, recipe
from torch import nn
from zoo import build, example

import qcompile
from qcompile.checkpoint.writers.export_refusals import (
    ExportError,
    check_class,
    check_modules,
    exact_scale,
    quantized_linears,
)
from qcompile.passes import FoldNorm, Fuse, LoRC, OnlineHadamard, Quantize, QuantizeKV, Rotate, Untie
from qcompile.recipe.recipe import Recipe

W4 = Quantize("int4/group32", None, keep_lm_head=True)


def after(*passes):
    model = decoder()
    qcompile.quantize(model, Recipe("r", passes), progress=False)
    return model


@pytest.mark.parametrize(
    "passes, words",
    [
        ((W4, LoRC(), Fuse()), "q_proj: a low-rank correction .*Fix: quantize without LoRC"),
        ((Untie(), FoldNorm(), Rotate(), OnlineHadamard(), W4, Fuse()), "down_proj: an online Hadamard transform"),
        ((QuantizeKV(8), W4, Fuse()), "the model: a 8-bit key/value cache of ours.*Fix: quantize without QuantizeKV"),
        ((Untie(), FoldNorm(), Rotate()), "no linear of LlamaForCausalLM is quantized.*Fix: give a recipe"),
    ],
)
def test_passes_without_a_form(passes, words):
    with pytest.raises(ExportError, match=words):
        check_modules(after(*passes), "a format")


def test_a_cache_that_is_optional_is_no_obstacle():
    check_modules(after(QuantizeKV(8, static=False, optional=True), W4, Fuse()), "a format")


def test_a_quantized_stack_of_experts():
    model = build("mixtral")
    qcompile.quantize(model, recipe("int4/group32", rules=()), example=example("mixtral"), progress=False)
    with pytest.raises(ExportError, match=r"experts.*: a quantized stack of experts, which a format cannot say. Fix"):
        check_modules(model, "a format")
    check_modules(model, "compressed-tensors")
    check_class(model, "compressed-tensors")
    del model.model.layers[0].mlp.experts.down_proj_codes
    with pytest.raises(ExportError, match="other tensors than those of its class"):
        check_class(model, "compressed-tensors")


def test_a_float_linear_behind_a_transform():
    model = decoder()
    passes = (Untie(), FoldNorm(), Rotate(), OnlineHadamard(), W4, Fuse())
    keep = qcompile.Rule("*.down_proj.*", keep=True)
    qcompile.quantize(model, Recipe("r", passes, (keep, *FLOAT_LOGITS)), progress=False)
    with pytest.raises(ExportError, match="down_proj: an online Hadamard transform"):
        check_modules(model, "a format")


def test_a_model_that_is_its_class_passes():
    for tied in (False, True):
        check_class(quantized("int4/group32", tied=tied), "a format")
    check_class(after(Untie(), FoldNorm(), Rotate(), W4, Fuse()), "a format")


def test_a_model_that_is_no_longer_its_class_is_refused():
    model = quantized("int4/group32")
    plain = copy.deepcopy(model)
    plain.model.norm = nn.RMSNorm(128)
    with pytest.raises(ExportError, match="model.norm: a RMSNorm in the place of a LlamaRMSNorm"):
        check_class(plain, "a format")
    linear = model.model.layers[0].mlp.up_proj
    linear.bias = torch.zeros(256)
    with pytest.raises(ExportError, match=r"other tensors than those of its class \(new \[.*up_proj.bias"):
        check_class(model, "a format")
    with pytest.raises(ExportError, match="Sequential is no model of transformers.*Fix: qcompile.save"):
        check_class(nn.Sequential(), "a format")


def test_codes_for_what_is_no_linear_are_refused():
    for name, kind in (("gpt2", "Conv1D"), ("falcon", "FalconLinear")):
        model = build(name)
        qcompile.quantize(model, recipe("int4/group32", rules=()), example=example(name), progress=False)
        with pytest.raises(ExportError, match=rf"codes for a {kind}, which is no plain Linear.*Rule.'.*\.\*', keep"):
            check_class(model, "a format")


def test_logits_of_their_own_must_not_be_tied_by_the_config():
    model = quantized("int4/group32", tied=True, rules=())
    assert isinstance(model.lm_head, qcompile.QuantLinear) and not model.config.tie_word_embeddings
    check_class(model, "a format")
    model.config.tie_word_embeddings = True
    with pytest.raises(ExportError, match="the logits: codes of their own where config.json ties them"):
        check_class(model, "a format")


def test_quantized_linears_are_found_at_all_their_paths():
    model = nn.Module()
    model.a = model.b = quantized("int8/row").model.layers[0].mlp.up_proj
    assert list(quantized_linears(model)) == ["a", "b"]


def test_a_scale_keeps_its_value_or_is_refused():
    assert exact_scale("a", torch.tensor([0.5, 3.0]), torch.float16, "a format", "do").dtype == torch.float16
    with pytest.raises(
        ExportError, match="a: scales that are no values of float16, which a format cannot say. Fix: do"
    ):
        exact_scale("a", torch.tensor([0.1]), torch.float16, "a format", "do")
