"""Quantizing site after site: each on the inputs that the quantized part of the model gives it."""

from __future__ import annotations

import pytest
import torch
from laws import rewrite
from padded_batches import LAYOUTS, decoder, padded, texts, unpadded
from torch import nn
from zoo import build, example

import qcompile
from qcompile.analysis.sites import find_sites
from qcompile.api.example_inputs import flat_inputs
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Quantize
from qcompile.passes.weights.choice import Choice
from qcompile.passes.weights.dgq import DGQ
from qcompile.passes.weights.gptaq import GPTAQ
from qcompile.passes.weights.gptq import GPTQ, gptq, inverse_factor
from qcompile.passes.weights.sequential import quantize_sequentially
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.registry import registered
from qcompile.recipe.report import PassReport, SiteReport
from qcompile.recipe.rule import Rule


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


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", [GPTQ, GPTAQ])
def test_grids_are_those_of_the_config(kind, clip):
    """Of sites on one input, the second in a format of its own; the first in eight bits, which are no logits."""
    model, x = Siblings().requires_grad_(False), torch.randn(40, 32)
    forms = {"first": Format("int8"), "second": Format.parse("int3/group16/zero")}
    more = {"strength": 0.0} if kind is GPTAQ else {}
    program = capture(model, (x,))
    rules = {"second.weight": Rule("second*", weight=forms["second"])}
    context = PassContext.of(program, batches=lambda: [[x]], rules=rules)
    run_pass = registered()[kind].run
    run_pass(program, kind(forms["first"], None, lm_head=Format("int8"), clip=clip, **more), context)
    for name, form in forms.items():
        grid = quantize_tensor(getattr(model, name).weight, form, clip=clip)
        assert torch.equal(program.weights[f"{name}.weight.scale"], grid.scale)
        assert not torch.equal(program.weights[f"{name}.weight.codes"], grid.stored()), "chosen by the Hessian"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [GPTQ, GPTAQ, DGQ])
def test_padding_changes_no_code(kind, layout):
    """Behind the texts or in front of them: neither is seen by their tokens, and neither counts."""
    _, program = decoder(layout)
    config = kind(Format.parse("int4/group8/zero/dual" if kind is DGQ else "int4/group8/zero"), None, lm_head=None)
    rows, found = texts([9, 3, 13]), []
    for batches in (unpadded(rows), [padded(rows)], [padded(rows, left=True, extra=2)]):
        after = program.copy()
        (report,) = rewrite(after, config, batches=batches)
        codes = [after.weights[name] for name in after.weights if name.endswith(".codes")]
        found.append(torch.cat([part.flatten() for part in codes]))
        assert not report.notes
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.slow
def test_padding_counts_for_no_expert():
    """Rows sorted by expert are followed to the index that chose them."""
    program = capture(build("mixtral"), (), {**example("mixtral"), "attention_mask": torch.ones(2, 8).long()})
    program.weights["model.embed_tokens.weight"] = program.weights["model.embed_tokens.weight"].clone()
    program.weights["model.embed_tokens.weight"][0] *= 50  # of the padding token
    found = []
    rows = texts([5, 11])
    for batches in (unpadded(rows), [padded(rows)]):
        hessians = []

        def choose(weight, hessian, form, hessians=hessians):
            hessians.append(hessian.clone())
            return Choice(quantize_tensor(weight, form))

        after, config = program.copy(), Quantize(Format("int8"), None)
        context = PassContext.of(after, batches=lambda batches=batches: batches)
        report = quantize_sequentially(after, config, context, PassReport(""), choose)
        assert not [note for note in report.notes if "padding" in note]
        found.append(hessians)
    assert len(found[0]) == len(found[1]) == 2 * (2 + 4 + 4)
    for want, hessian in zip(*found, strict=True):
        assert torch.allclose(want, hessian, rtol=1e-3, atol=1e-4 * float(want.diagonal().max()) + 1e-9)


class Siblings(nn.Module):
    """Two linears on one correlated input, and the logits."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 24), nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, x):
        x = x.cumsum(-1)
        return self.head(torch.tanh(self.first(x)) * self.second(x))


class Experts(nn.Module):
    """Two linears on one input, then a batched product with a stack of three experts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.stack = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x):
        return torch.bmm(torch.relu(self.first(x)) * self.second(x), self.stack)


def test_hessians_are_those_of_the_input_and_fallbacks_are_named():
    torch.manual_seed(0)
    model, x = Experts().requires_grad_(False), torch.randn(3, 20, 16)
    program = capture(model, (x,))
    problems = []

    def choose(weight, hessian, form):
        problems.append((weight, hessian))
        return Choice(quantize_tensor(weight, form), fell_back=True)

    sites = {name: SiteReport(name, 16, 16) for name in ("first.weight", "second.weight", "stack")}
    context = PassContext.of(program, batches=lambda: [[x[:, :5]], [x[:, 5:]]], sites=sites)
    report = quantize_sequentially(program, Quantize("int8", None, lm_head=None), context, PassReport(""), choose)
    assert report.done == list(sites)
    assert report.notes == [
        "singular Hessian, rounded to nearest: first.weight, second.weight, stack[0], stack[1], stack[2]"
    ]
    (both, hessian), *experts = problems
    assert torch.equal(both, torch.cat([model.first.weight, model.second.weight]))  # one Hessian for siblings
    rows = x.flatten(0, 1).double()
    assert torch.allclose(hessian, rows.t() @ rows, rtol=1e-5)
    exact = both.double() @ rows.t()
    error = (both - quantize_tensor(both, Format("int8")).dequantize()).double() @ rows.t()
    expected = float(error.square().sum() / exact.square().sum())
    for name in ("first.weight", "second.weight"):
        assert sites[name].output_error == pytest.approx((expected, expected), rel=1e-3)
    assert sites["stack"].output_error is not None and 0 < sites["stack"].output_error[1] < 0.01
    first, second = (
        quantize_tensor(layer.weight, Format("int8")).dequantize() for layer in (model.first, model.second)
    )
    hidden = torch.relu(x @ first.t() + model.first.bias) * (x @ second.t() + model.second.bias)
    for expert, (weight, found) in enumerate(experts):
        assert torch.equal(weight, model.stack[expert].t())
        rows = hidden[expert].double()
        assert torch.allclose(found, rows.t() @ rows, rtol=1e-4, atol=1e-4)
