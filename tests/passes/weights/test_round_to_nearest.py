"""Quantize: every weight within half a scale, and float consumers of a shared weight untouched."""

from __future__ import annotations

import pytest
import torch
from laws import rewrite, shape
from torch import nn

from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture
from qcompile.ir.op_calls import DequantizeCall
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Quantize
from qcompile.recipe.rule import RecipeError
from qcompile.testing import Decoder


def test_weights_are_within_half_a_scale():
    model = Decoder(shape())
    before = capture(model, (model.example(),))
    after = before.copy()
    (report,) = rewrite(after, Quantize("int4", None, lm_head="int8"), batches=[[model.example()]])
    names = [site.name for site in find_sites(before)]
    assert report.done == names and not report.skipped
    for node, call in DequantizeCall.find(after):
        name = after.weight_name(call.codes).removesuffix(".codes")
        arguments = [after.weight_of(a) if isinstance(a, torch.fx.Node) else a for a in call.arguments]
        error = (torch.ops.qcompile.dequantize(*arguments) - before.weights[name]).abs()
        assert bool((error <= 0.501 * after.weights[f"{name}.scale"]).all()), node
        assert call.format == ("int8/row" if name == "head.weight" else "int4/row")


@pytest.mark.parametrize("clip", [False, True])
def test_codes_are_those_of_the_weight_alone(clip):
    model, x = nn.Sequential(nn.Linear(32, 16)).requires_grad_(False), torch.randn(3, 32)
    with torch.no_grad():
        model[0].weight[0, 0] = 20.0  # an outlier, which only the clip search cuts
    program = capture(model, (x,))
    rewrite(program, Quantize("int4/group16", None, lm_head=None, clip=clip), batches=[[x]])
    found = {c: quantize_tensor(model[0].weight, Format.parse("int4/group16"), clip=c) for c in (False, True)}
    assert not torch.equal(found[False].scale, found[True].scale)
    assert torch.equal(program.weights["0.weight.codes"], found[clip].stored())
    assert torch.equal(program.weights["0.weight.scale"], found[clip].scale)


def test_codes_are_made_once_for_one_weight_format_and_clip():
    """While a program lives that has them, and never for another format."""
    layer, x = nn.Linear(32, 16).requires_grad_(False), torch.randn(3, 32)
    layer.weight[0, 0] = 20.0
    program, kept = capture(layer, (x,)), []
    for form, clip in (("int4/group16", False), ("int4/group16", True), ("int8", True), ("int4/group16", False)):
        after = program.copy()
        rewrite(after, Quantize(form, None, lm_head=None, clip=clip), batches=[[x]])
        want = quantize_tensor(layer.weight, Format.parse(form), clip=clip)
        assert torch.equal(after.weights["weight.codes"], want.stored())
        assert torch.equal(after.weights["weight.scale"], want.scale)
        kept.append(after)
    assert len({after.weights["weight.codes"].data_ptr() for after in kept}) == 3


def test_an_embedding_keeps_its_float_table():
    model = Decoder(shape(tied=True))
    program = capture(model, (model.example(),))
    rewrite(program, Quantize("int8", None), batches=[[model.example()]])
    (table,) = (n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default)
    assert torch.equal(program.weight_of(table.args[0]), model.embedding.weight)
    names = {program.weight_name(call.codes) for _, call in DequantizeCall.find(program)}
    assert "embedding.weight.codes" in names


def test_a_weight_that_cannot_be_rounded_is_named():
    model, x = nn.Sequential(nn.Linear(8, 4)).requires_grad_(False), torch.randn(3, 8)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    program = capture(model, (x,))
    with pytest.raises(RecipeError, match=r"the weight 0\.weight cannot be quantized to int8/row"):
        rewrite(program, Quantize(lm_head=None), batches=[[x]])
