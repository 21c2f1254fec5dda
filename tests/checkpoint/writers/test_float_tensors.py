"""The tensors that stay: each once, by the names of checkpoints."""

from __future__ import annotations

import pytest
import torch
from served_models import decoder, quantized
from zoo import build

from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.float_tensors import float_tensors, model_dtype, stores_otherwise


def test_quantized_linears_and_tied_tensors_are_left_out():
    model = quantized("int4/group32", tied=True)
    found = float_tensors(model, "a format")
    assert set(found) == {
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip
    assert torch.equal(found["model.norm.weight"], model.model.norm.weight)
    assert "lm_head.weight" in float_tensors(quantized("int4/group32"), "a format")


def test_float_stacks_of_experts_get_their_names_in_checkpoints():
    model = build("mixtral")
    found = float_tensors(model, "a format")
    assert any(".experts.1." in name for name in found), "checkpoints have a tensor for each expert"
    assert stores_otherwise(model) and not stores_otherwise(decoder())
    assert sum(t.numel() for t in found.values()) == sum(p.numel() for p in model.parameters())


def test_a_weight_that_checkpoints_name_otherwise_is_refused(monkeypatch):
    from transformers import core_model_loading

    def renamed(model, state):
        return {name.replace("up_proj", "w3"): tensor for name, tensor in state.items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", renamed)
    with pytest.raises(ExportError, match="up_proj: a weight that checkpoints store as model.layers.0.mlp.w3.weight"):
        float_tensors(quantized("int4/group32"), "a format")


def test_the_dtype_is_that_of_the_parameters():
    assert model_dtype(decoder(torch.bfloat16)) == torch.bfloat16 and model_dtype(torch.nn.Module()) == torch.float32
