"""PerTensorActivations: a per-tensor scale only where it is about as good as per-token scales."""

from __future__ import annotations

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import rewrite
from padded_batches import decoder, padded, texts
from torch import nn
from zoo import build, example

import qcompile
from qcompile.api.example_inputs import flat_inputs
from qcompile.backend.dynamo import reports
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, PerTensorActivations, Quantize
from qcompile.passes.activations.per_tensor_activations import error_ratio, per_tensor_activations
from qcompile.pipeline.run import run
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError, Rule

TENSOR = Format("int8", "tensor")


def test_padding_has_no_part_in_the_errors():
    _, program = decoder()
    notes = []
    for batch in (padded(texts([9, 9])), padded(texts([9, 9]), extra=4), padded(texts([9, 9]), extra=4, left=True)):
        (report,) = rewrite(program.copy(), PerTensorActivations(lm_head=True), batches=[batch])
        notes.append((report.done, report.notes, report.skipped))
    assert notes[0] == notes[1] == notes[2]


@given(
    seed=st.integers(0, 10**6),
    zero=st.booleans(),
    larger=st.sampled_from([1.0, 30.0, 1000.0]),
    outputs=st.sampled_from([8, 24]),
)
def test_the_error_ratio(seed, zero, larger, outputs):
    """By hand: the errors of both roundings, through the weight; a massive token makes the difference."""
    generator = torch.Generator().manual_seed(seed)
    act = Format("int8", "tensor", zero="int" if zero else "none")
    inputs = [torch.randn(2, 8, 16, generator=generator) for _ in range(2)]
    inputs[1][0, 3] *= larger
    weight = torch.randn(outputs, 16, generator=generator)

    def error(per_row):
        total = 0.0
        for x in inputs:
            rows = x.reshape(-1, 16) if per_row else x.reshape(1, -1)
            low = rows.amin(1, keepdim=True).clamp_max(0)
            scale = (rows.amax(1, keepdim=True).clamp_min(0) - low) / 255 if zero else rows.abs().amax(1, True) / 127
            away = (rows / scale).round() * scale - rows
            moved, size = ((t.reshape(-1, 16) @ weight.t()).norm(dim=1) for t in (away, x))
            total += float((moved / size).square().sum())
        return total**0.5

    found = error_ratio(inputs, weight, act)
    assert found == pytest.approx(error(False) / error(True), rel=0.05 if zero else 1e-3)  # a zero point may clip
    if larger == 1000:
        assert found > 20
    if larger == 1:
        assert found < 2


def test_nothing_is_as_good_as_nothing():
    assert error_ratio([torch.zeros(1, 4, 8)], torch.ones(3, 8), TENSOR) == 1.0
    rows = torch.tensor([[127.0, 3.0], [127000.0, 5000.0]])  # integers times scales of their own
    assert error_ratio([rows], torch.eye(2), TENSOR) == float("inf")


class Chain(nn.Module):
    """A site whose tokens are alike, and one that reads a massive token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.second = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.size = nn.Parameter(torch.ones(8, 1))
        self.size.data[0] = 300

    def forward(self, x):
        return self.second(self.first(x) * self.gate(x) * self.size)


def acts(model):
    return {name: m.act for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def quantized(most, rules=(), weight="int8"):
    model, data = Chain(), [torch.randn(2, 8, 16)]
    small = Quantize(Format.parse(weight), Format("int8"), lm_head=None)
    recipe = Recipe("coarse", (PerTensorActivations(most=most, lm_head=True), small, Fuse()), tuple(rules))
    return model, qcompile.quantize(model, recipe, data, progress=False)


def test_sites_are_chosen_by_what_they_read():
    model, report = quantized(2.0)
    assert acts(model) == {"first": TENSOR, "gate": TENSOR, "second": Format("int8")}
    (note,) = report.passes[0].notes
    assert note.startswith("2 of 3 sites get a per-tensor scale (these 1.") and ", others " in note
    assert "times the error of per-token scales" in report.passes[0].skipped[0].reason
    model, _ = quantized(1e6)
    assert set(acts(model).values()) == {TENSOR}
    model, _ = quantized(1.0)
    assert set(acts(model).values()) == {Format("int8")}


def test_rules_come_first():
    row = Format("int8", zero="int")
    model, _ = quantized(1e6, [Rule("first*", act=row), Rule("gate*", weight=Format("int4", "row"))])
    assert acts(model) == {"first": row, "gate": TENSOR, "second": TENSOR}
    assert model.gate.format == Format("int4", "row")
    model, _ = quantized(1e6, [Rule("first*", keep=True)])
    assert set(acts(model)) == {"gate", "second"}


class Parts(nn.Module):
    """One site of each kind: judged, kept float, choosing experts, a stack of experts, and the logits."""

    def __init__(self):
        super().__init__()
        self.first, self.kept, self.router = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.stack, self.head = nn.Parameter(torch.randn(3, 16, 16)), nn.Linear(16, 4)

    def forward(self, x):
        share, _ = self.router(x).softmax(-1).topk(1)
        return self.head(torch.bmm(self.first(x) * self.kept(x), self.stack).relu() * share)


def test_sites_on_one_value_are_judged_together():
    """Their products are one: where the second cannot have a per-tensor scale, the first has none either."""

    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.first.weight.data[:, 1:] = 0

        def forward(self, x):
            return torch.tanh(self.first(x)) * torch.tanh(self.second(x))

    model, x = Siblings().requires_grad_(False), 0.3 * torch.randn(1, 8, 16)
    x[..., 0] = 300 / 127  # one step of the massive token's scale, and 127 of any other token's
    x[0, 3, 0] = 300.0
    assert error_ratio([x], model.first.weight, TENSOR) <= 1
    (report,) = rewrite(capture(model, (x,)), PerTensorActivations(lm_head=True), batches=[[x]])
    assert not report.done and [place.site for place in report.skipped] == ["first.weight", "second.weight"]


def test_padding_that_counts_is_told():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, attention_mask):
            return torch.tanh(self.inner(x)) + attention_mask.sum()

    inputs = [torch.randn(2, 3, 4), torch.full((2, 3), 2)]
    program = capture(Masked().requires_grad_(False), tuple(inputs))
    (report,) = rewrite(program, PerTensorActivations(lm_head=True), batches=[inputs])
    assert report.notes[0].startswith("attention_mask is not 2-D of 0 and 1")


@pytest.mark.parametrize(
    "lm_head, rules, done",
    [
        (False, {}, ["first.weight"]),
        (True, {}, ["first.weight", "head.weight"]),
        (False, {"router.weight": Rule("router*", weight=Format("int8"))}, ["router.weight", "first.weight"]),
    ],
)
def test_what_is_left_out(lm_head, rules, done):
    x = torch.randn(3, 5, 16)
    program = capture(Parts().requires_grad_(False), (x,))
    context = PassContext.of(program, batches=lambda: [[x]], rules=dict(rules), keep_float={"kept.weight": "slow"})
    report = per_tensor_activations(program, PerTensorActivations(lm_head=lm_head, most=1e6), context)
    assert report.done == done and {name for name, rule in context.rules.items() if rule.act} == set(done)
    assert [place.site for place in report.skipped] == ([] if rules else ["router.weight"])
    assert all(context.rules[name].weight == rule.weight for name, rule in rules.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_an_onnx_file_rounds_as_the_module_does(name, tmp_path):
    recipe = Recipe(
        "coarse", (PerTensorActivations(most=2), Quantize(Format("int8"), Format("int8"), clip=True), Fuse())
    )
    model = build(name)
    extra = dict(example=example(name)) if name == "bert" else {}
    report = qcompile.export_onnx(model, tmp_path / "m", recipe, [example(name)], progress=False, **extra)
    assert report.passes[0].done and report.metrics["onnx relative error"] < 0.05
    graph = onnx.load(tmp_path / "m/model.onnx", load_external_data=False).graph
    every_token = [n for n in graph.node if n.op_type == "ReduceMax" and len(n.input) == 1]
    assert 0 < len(every_token) <= len(report.passes[0].done)


@pytest.mark.parametrize("weight", ["int8", "int4/group32/dual"])
def test_it_compiles_to_integer_products(weight):
    """As per-token scales do, and to the same values as eager."""
    model, report = quantized(1e6, weight=weight)
    x = torch.randn(3, 8, 16)
    reports.clear()
    with torch.no_grad():
        want, got = model(x), torch.compile(model, backend="qcompile")(x)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    kernels = {k.split()[0] for found in reports for s in found.sites for k in s.kernel.values()}
    assert kernels == {"int8_linear" if weight == "int8" else "dual_linear"}


def test_what_chooses_experts_stays_float():
    program = capture(build("mixtral"), (), example("mixtral"))
    flat = flat_inputs(program, example("mixtral"), example("mixtral"))
    small = Quantize(Format("int8"), Format("int8"), lm_head=None)
    recipe = Recipe("coarse", (PerTensorActivations(most=1e6), small, Fuse()))
    _, report = run(program, recipe, batches=lambda: [flat])
    routers = {place.site for place in report.passes[0].skipped if "chooses experts" in place.reason}
    assert routers and routers == {site.name for site in report.sites if not site.quantized}


def test_the_logits_are_excluded_unless_requested():
    small = Quantize(Format("int8"), Format("int8"), lm_head_act=Format("int8"))
    for lm_head in (False, True):
        model = build("llama")
        recipe = Recipe("coarse", (PerTensorActivations(most=1e6, lm_head=lm_head), small, Fuse()))
        qcompile.quantize(model, recipe, [example("llama")], progress=False)
        assert model.lm_head.act == (TENSOR if lm_head else Format("int8"))


def test_a_scale_must_fit_wherever_a_weight_is_called():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.size = nn.Linear(16, 16, bias=False), nn.Parameter(torch.ones(8, 1))
            self.size.data[0] = 300

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x * self.size)))

    torch.manual_seed(0)
    model = Again()
    coarse = PerTensorActivations(most=2, lm_head=True)
    recipe = Recipe("coarse", (coarse, Quantize(Format("int8"), Format("int8"), lm_head=None), Fuse()))
    qcompile.quantize(model, recipe, [torch.randn(2, 8, 16)], progress=False)
    assert model.layer.act == Format("int8")


def test_bad_input():
    with pytest.raises(RecipeError, match="most must be at least 1"):
        PerTensorActivations(most=0.5)
    with pytest.raises(RecipeError, match="an integer format per tensor, got int8/row"):
        PerTensorActivations(act=Format("int8"))
    with pytest.raises(RecipeError, match="an integer format per tensor, got fp8/tensor"):
        PerTensorActivations(act=Format("fp8", "tensor"))
    Recipe("logits in their own format", (PerTensorActivations(), Quantize(), Fuse())).check()
    with pytest.raises(RecipeError, match="quantizing pass behind it"):
        Recipe("none", (Quantize(), PerTensorActivations(), Fuse())).check()
    for quantizer, words in (
        (Quantize(act=None), "needs act=int8/row in Quantize, which has None"),
        (Quantize(act=Format("int8", zero="int")), "which has int8/row/zero"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe("other", (PerTensorActivations(), quantizer, Fuse())).check()
    with pytest.raises(RecipeError, match="Fix: give it, or lm_head=False"):
        Recipe("logits", (PerTensorActivations(lm_head=True), Quantize(), Fuse())).check()
    model = Chain()
    recipe = Recipe("coarse", (PerTensorActivations(), Quantize(lm_head=None), Fuse()))
    with pytest.raises(CalibrationError, match=r"batches \[2\] bring NaN or Inf to"):
        qcompile.quantize(model, recipe, [torch.randn(2, 8, 16), torch.full((2, 8, 16), torch.nan)], progress=False)
    recipe = Recipe("coarse", (PerTensorActivations(), Quantize(lm_head=None), Fuse()))
    with pytest.raises(RecipeError, match="needs calibration data for PerTensorActivations"):
        qcompile.quantize(model, recipe, example=torch.randn(2, 8, 16), progress=False)
    assert isinstance(model.first, nn.Linear)
