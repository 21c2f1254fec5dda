"""GPTQ's layout: read by its definition, word by word, it gives the model's weights."""

from __future__ import annotations

import pytest
import torch
from served_models import quantized

from qcompile.checkpoint.writers.export_refusals import ExportError, quantized_linears
from qcompile.checkpoint.writers.gptq_layout import check_gptq, gptq_layout, one_format
from qcompile.numerics.format import Format
from qcompile.recipe.rule import Rule


def by_definition(tensors, path, bits, version):
    """w[n, k] = scales[g_idx[k], n] (q - z), every code cut out of its stream of bits by itself."""
    qweight, qzeros = tensors[f"{path}.qweight"], tensors[f"{path}.qzeros"]
    scales, groups = tensors[f"{path}.scales"], tensors[f"{path}.g_idx"].tolist()

    def cut(column, index):
        stream = sum((word % 2**32) << (32 * i) for i, word in enumerate(column))
        return stream >> (index * bits) & (2**bits - 1)

    k, n = len(groups), scales.shape[1]
    q = torch.tensor([[cut(column, i) for i in range(k)] for column in qweight.t().tolist()])
    z = torch.tensor([[cut(row, i) for i in range(n)] for row in qzeros.tolist()]) + (version == "gptq")
    return scales.float()[groups].t() * (q - z[groups].t())


@pytest.mark.parametrize(
    "form", ["int4/group32", "int8/row", "int3/group64", "int4/group32/zero", "int2/group128/zero"]
)
def test_it_holds_the_weights(form):
    model = quantized(f"{form}/bf16", dtype=torch.bfloat16, clip=True)
    layout = gptq_layout(model)
    config = layout.quantization_config
    assert layout.files == {"quantize_config.json": config} and config["sym"] == ("zero" not in form)
    path = "model.layers.0.self_attn.k_proj"
    read = by_definition(layout.tensors, path, config["bits"], config["checkpoint_format"])
    assert torch.equal(read, model.get_submodule(path).weight)
    assert layout.tensors[f"{path}.scales"].dtype == torch.bfloat16
    assert config["group_size"] == (-1 if "row" in form else Format.parse(form).group)
    assert config["lm_head"] is False and config["desc_act"] is False


def test_symmetric_zero_points_are_the_words_that_all_readers_expect():
    zeros = gptq_layout(quantized("int4/group32/f16", dtype=torch.float16)).tensors["model.layers.0.mlp.up_proj.qzeros"]
    assert set(zeros.flatten().tolist()) == {0x77777777}


@pytest.mark.parametrize(
    "weight, act, columns, dtype, words",
    [
        ("int4/group32/bf16", "int8", 128, torch.bfloat16, "activations in int8/row"),
        ("int4/group32", None, 128, torch.float32, "a float32 model.*Fix: load the model in bfloat16"),
        ("int4/group32", None, 128, torch.bfloat16, "Fix: quantize to int4/group32/bf16"),
        ("int4/group48/bf16", None, 128, torch.bfloat16, "a last group of 32 of 48 columns"),
        ("int4/group32/floatzero/f16", None, 128, torch.float16, "weights in int4/group32/floatzero/f16"),
        ("fp8/row/bf16", None, 128, torch.bfloat16, "weights in fp8/row/bf16"),
        ("int4/row/bf16", None, 100, torch.bfloat16, "K = 100, no multiple of 32"),
    ],
)
def test_what_it_cannot_say(weight, act, columns, dtype, words):
    with pytest.raises(ExportError, match=f"^layer: .*{words}"):
        check_gptq("layer", Format.parse(weight), None if act is None else Format.parse(act), columns, dtype)


def test_all_linears_but_the_logits_have_one_format():
    rules = (Rule("*.down_proj.*", weight="int4/group64/bf16"), Rule("lm_head.*", keep=True))
    model = quantized("int4/group32/bf16", dtype=torch.bfloat16, rules=rules)
    with pytest.raises(ExportError, match="down_proj: int4/group64/bf16 beside int4/group32/bf16"):
        one_format("gptq", quantized_linears(model))
    rules = (Rule("*.down_proj.*", keep=True), Rule("lm_head.*", keep=True))
    with pytest.raises(ExportError, match="down_proj: a float linear other than the logits"):
        gptq_layout(quantized("int4/group32/bf16", dtype=torch.bfloat16, rules=rules))
