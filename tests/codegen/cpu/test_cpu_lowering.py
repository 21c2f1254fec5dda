"""A quantized linear layer in terms of the CPU kernels: which one, and the same output as the dialect's."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu.cpu_lowering import lower_to_cpu
from qcompile.ir.capture import capture
from qcompile.ir.op_calls import OUR_OPS
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "weight,act,kernel",
    [
        ("int8/row", "int8/row", "int8_mm"),
        ("int8/row", None, "int8_float"),
        ("int4/group32/zero/dual", "int8/row", "dual_mm"),
        ("int4/group32/dual", "int8/row", "dual_mm"),
        ("int4/group32/zero", None, "nibble_float"),
        ("int4/group32/dual", None, "nibble_float"),
        ("fp4/group32", None, "dequant_mm"),
        ("fp8/row", "fp8/row", "dequant_mm"),
    ],
)
def test_the_kernel_computes_what_the_dialect_means(weight, act, kernel, bias):
    form, act_form = Format.parse(weight), Format.parse(act) if act else None
    recipe = Recipe("one", (Quantize(form, act_form, lm_head=form, lm_head_act=act_form), Fuse()))
    model, x = torch.nn.Linear(96, 40, bias=bias), torch.randn(5, 96)
    program, _ = run(capture(model, (x,)), recipe, verify=False)
    lowered, prepared = program.copy(), []

    def remember(layout, sources, make):
        prepared.append(layout)
        return make()

    chosen = lower_to_cpu(lowered, remember)
    ((site, by_rows),) = chosen.items()
    assert site == "weight" and all(text.startswith(kernel) for text in by_rows.values())
    assert len(prepared) == (kernel in ("dual_mm", "nibble_float"))
    if act != "fp8/row":  # whose quantize stays a call of the dialect
        assert not any(node.target in OUR_OPS for node in lowered.graph.nodes)
    for m in (5, 40):  # small M and large M
        x = torch.randn(m, 96)
        assert torch.allclose(lowered(x)[0], program(x)[0], rtol=1e-4, atol=1e-4)
