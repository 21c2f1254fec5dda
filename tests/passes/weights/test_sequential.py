"""Quantizing site after site: each on the inputs that the quantized part of the model gives it."""

from __future__ import annotations

import pytest
import torch
from laws import rewrite
from zoo import build, example

import qcompile
from qcompile.analysis.sites import find_sites
from qcompile.api.example_inputs import flat_inputs
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.weights.gptq import GPTQ, gptq, inverse_factor
from qcompile.recipe.recipe import Recipe


@pytest.mark.parametrize("lm_head", [None, "int3/group32/zero", "int4/group64/zero"])
def test_later_sites_see_quantized_inputs(lm_head):
    model = build("llama")
    program = capture(model, (), example("llama"))
    batch = flat_inputs(program, example("llama"), example("llama"))
    form = Format.parse("int3/group32/zero")
    config = GPTQ(form, None, lm_head=lm_head and Format.parse(lm_head))
    after = program.copy()
    rewrite(after, config, batches=[batch])
    # The last site, solved by hand on what the quantized program gives it.
    last = find_sites(program)[-1]
    node = next(n for n in after.graph.nodes if n.name == last.node.name)
    inputs = []
    after.watch([node.args[0]], batch, lambda n, v: inputs.append(v))
    rows = inputs[0].flatten(0, -2)
    hessian = (rows.t() @ rows).double()
    order = hessian.diagonal().argsort(descending=True)
    grid = quantize_tensor(program.weights[last.name], config.lm_head or config.weight)
    want = gptq(program.weights[last.name], hessian, grid, inverse_factor(hessian[order][:, order], 0.01), order)
    assert torch.equal(after.weights[f"{last.name}.codes"], want.stored())


def test_logits_in_eight_bits_are_rounded_to_nearest_and_the_report_says_so():
    model = build("llama")
    form = Format.parse("int3/group32/zero")
    recipe = Recipe("small", (GPTQ(form, None, lm_head=Format("int8"), clip=True), qcompile.passes.Fuse()))
    report = qcompile.quantize(model, recipe, [example("llama")], progress=False)
    assert torch.equal(model.lm_head.codes, quantize_tensor(build("llama").lm_head.weight, Format("int8")).stored())
    assert [note.partition(": ")[2] for note in report.passes[0].notes] == [
        "the logits in int8/row are rounded to nearest, unclipped"
    ]
