"""The pass on graphs: what it inserts keeps the output bit for bit, whatever enters the product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile import Format, Recipe, RecipeError, capture
from qcompile.ir.node_meta import MODULE
from qcompile.ir.op_calls import DequantizeCall, GroupAdapterCall, QLinearCall
from qcompile.passes import Fuse, QALoRA, Quantize
from qcompile.pipeline.run import run


def quantized(act=None):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).eval()
    form = Format.parse(act) if act else None
    recipe = Recipe("groups", (Quantize(Format.parse("int4/group32/zero"), form), Fuse()))
    qcompile.quantize(model, recipe, example=torch.randn(4, 64), progress=False)
    return capture(model, (torch.randn(4, 64),))


@pytest.mark.parametrize("act", [None, "int8/row", "int8/row/zero"])
def test_an_adapter_stands_beside_the_product_and_adds_nothing(act):
    program, x = quantized(act), torch.randn(3, 64)
    adapted, report = run(program, Recipe("a", (QALoRA(4, 8.0),)), example=[x])
    assert torch.equal(adapted(x)[0], program(x)[0]) and report.certificates[0].error == 0
    calls = list(GroupAdapterCall.find(adapted))
    assert [node.meta[MODULE] for node, _ in calls] == ["0", "2"]
    for (_, call), (_, product) in zip(calls, QLinearCall.find(adapted), strict=False):
        assert call.group == 32 and call.scaling == 2.0
        operand = DequantizeCall.of(call.x).codes if act else call.x
        assert operand is product.x, "it reads what enters the product"


def test_an_adapter_that_says_something_is_no_identity():
    program, x = quantized(), torch.randn(3, 64)
    adapted, _ = run(program, Recipe("a", (QALoRA(4, 8.0),)))
    adapted.weights["0.lora_b"] = torch.randn(64, 4)
    assert not torch.allclose(adapted(x)[0], program(x)[0], atol=1e-3)


def test_sites_without_adapters_say_why():
    program = quantized()
    _, report = run(program, Recipe("a", (QALoRA(4, 8.0),)))
    assert [(item.site, item.reason) for item in report.passes[0].skipped] == [
        ("4", "int8/row has one scale for a row: quantize in groups, as int4/group32/zero")
    ]
    match = r"adapts no product: 0: rank 65 is larger than a side of its weight. Fix: rank=64 or smaller.*; 2: rank 65"
    with pytest.raises(RecipeError, match=match) as error:
        run(program, Recipe("a", (QALoRA(65, 8.0),)))
    assert "w4a16-g32" not in str(error.value), "that would not help"


def test_a_weight_that_is_smaller_than_the_rank_is_left_and_the_others_are_adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                          nn.Linear(64, 8))  # fmt: skip
    qcompile.quantize(model.eval(), "w4a16-g32", example=torch.randn(3, 64), progress=False)
    report = qcompile.qa_lora(model, rank=32, example=torch.randn(3, 64))
    assert report.passes[0].done == ["4"]
    skipped = {item.site: item.reason for item in report.passes[0].skipped}
    assert all("rank 32 is larger than a side of its weight. Fix: rank=16" in skipped[name] for name in ("0", "2"))
    qcompile.settle(model)


def test_adapters_and_quantization_are_two_recipes():
    with pytest.raises(RecipeError, match="Quantize prepares for inference, in a recipe that trains"):
        Recipe("both", (Quantize(), QALoRA())).check()
