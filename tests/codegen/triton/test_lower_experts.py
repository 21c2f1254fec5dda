"""Mixtures of experts in terms of experts_w: which sites, gathered rows, and the same outputs."""

from __future__ import annotations

import pytest
import torch
from lowered_programs import fake_outputs, lowered, make_always, row_quants
from zoo import build, example

from qcompile.api.example_inputs import widen_batch
from qcompile.codegen.triton.gpu_lowering import lower_to_gpu
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.triton_op_calls import ExpertsA8Call, ExpertsW4A8Call, ExpertsWCall, RowQuantCall
from qcompile.ir.capture import capture
from qcompile.ir.op_calls import OUR_OPS, DequantizeCall, QExpertsCall
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.presets import PRESETS
from qcompile.pipeline.run import run
from qcompile.recipe.certificate import widen
from qcompile.recipe.recipe import Recipe

MODELS = ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)]
ALONE = "gemm_experts (not measured on this GPU)"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["w4a16", "int8", "w4a8"])
def test_a_model_that_was_quantized_in_place(name, recipe):
    model, batch = build(name).half(), example(name)
    with torch.no_grad():
        plain = model(**batch)[0].float()
    program, found, inputs, chosen = lowered(model, batch, recipe)
    calls = [call for _, call in ExpertsWCall.find(found)]
    assert len(calls) == 4 and sum(call.rows is not None for call in calls) == 2  # two layers; the second product reads
    # what the first wrote, in its order
    assert not any(node.target in OUR_OPS for node in found.graph.nodes) and not list(DequantizeCall.find(found))
    experts = [label for site, by_rows in chosen.items() if "experts" in site for label in by_rows.values()]
    assert experts == [ALONE] * 4
    want, got = program(*inputs)[0].float(), found(*inputs)[0].float()
    assert float((got - want).norm()) <= max(2e-3 * float(want.norm()), 1.5 * float((want - plain).norm()))
    assert {o.device.type for o in fake_outputs(found, inputs)} == {"cuda"}


@pytest.mark.parametrize("recipe", ["w4a16", "int8"])
def test_a_float_model_by_a_recipe(recipe):
    program = capture(build("mixtral").half(), *widen_batch((), example("mixtral")))
    quantized, _ = run(program, PRESETS[recipe], verify=False)
    found = quantized.copy()
    assert len(list(QExpertsCall.find(found))) == 4
    chosen = lower_to_gpu(found, make_always)
    assert len(list(ExpertsWCall.find(found))) == 4 and not list(QExpertsCall.find(found))
    names = [site for site in chosen if "experts" in site]
    assert len(names) == 4 and not any(site.endswith(".codes") for site in names)
    inputs = widen(list(example("mixtral").values()), torch.float16)
    want, got = quantized(*inputs)[0].float(), found(*inputs)[0].float()
    assert float((got - want).norm()) <= 2e-2 * float(want.norm())


QUANTIZED = [
    ("int8", "int8", ExpertsA8Call, "gemm_experts_a8"),
    ("fp8", "fp8", ExpertsA8Call, "gemm_experts_a8"),
    ("int4/group32/zero/dual", "int8", ExpertsW4A8Call, "gemm_experts_w4a8"),
    ("int4/row", "int8", ExpertsW4A8Call, "gemm_experts_w4a8"),
    ("int4/group16/zero/dual", "int8", ExpertsA8Call, "gemm_experts_a8, int8 of dual codes"),
]


@pytest.mark.parametrize("form,act,kind,kernel", QUANTIZED, ids=[f"{case[0]} by {case[1]}" for case in QUANTIZED])
def test_codes_by_codes(form, act, kind, kernel):
    """Rows are quantized before they are gathered, with what stands before them; the outputs stay."""
    batch = example("mixtral")
    program = capture(build("mixtral").half(), *widen_batch((), batch))
    recipe = Recipe("quantized", (Quantize(Format.parse(form), Format.parse(act), experts_act=act), Fuse()))
    quantized, _ = run(program, recipe, verify=False)
    found = quantized.copy()
    chosen = lower_to_gpu(found, make_always)
    calls = [call for _, call in kind.find(found)]
    assert len(calls) == 4 and [call.rows is not None for call in calls] == [True, False] * 2
    assert not any(node.target in OUR_OPS for node in found.graph.nodes)
    experts = [label for site, by_rows in chosen.items() if "experts" in site for label in by_rows.values()]
    assert experts == [f"{kernel} (not measured on this GPU)"] * 4
    specs = row_quants(found)
    assert sum(spec.first == "gate" for spec in specs) == 2, "the second product reads the gate's codes"
    assert sum(spec.first == "rms" and spec.value for spec in specs) == 2, "one for the rows of all experts"
    inputs = widen(list(batch.values()), torch.float16)
    want, got = quantized(*inputs)[0].float(), found(*inputs)[0].float()
    assert float((got - want).norm()) <= 2e-2 * float(want.norm())
    assert {o.device.type for o in fake_outputs(found, inputs)} == {"cuda"}


@pytest.mark.parametrize(
    "act,rows,why",
    [
        ("int8/tensor", 64, "no kernel for stacks of int8/row weights by int8/tensor x"),
        ("int8/row/zero", 64, "no kernel for int8/row weights by int8/row/zero x"),
        ("int8/row", 40, "K = 40 is no multiple of 16"),
    ],
)
def test_rows_that_no_kernel_reads_stay_and_the_report_says_why(act, rows, why):
    program = capture(QuantizedRows("int8/row", act, rows), (torch.randn(4, rows), *indices()))
    found = program.copy()
    (by_rows,) = lower_to_gpu(found, make_always).values()
    assert set(by_rows.values()) == {f"dequantize, then cuBLAS ({why})"} and len(list(QExpertsCall.find(found))) == 1


@pytest.mark.parametrize("choose,gathered", [(lambda x, rows: x[rows], True), (lambda x, rows: x * 2, False)])
def test_a_quantization_moves_before_a_gather(choose, gathered):
    inputs = torch.randn(4, 64), *indices()
    program = capture(QuantizedRows("int8/row", "int8/row", 64, choose), inputs)
    found = program.copy()
    lower_to_gpu(found, make_always)
    ((_, call),) = ExpertsA8Call.find(found)
    assert (call.rows is not None) == gathered and call.dtype == torch.float16
    (quantize,) = [node for node in found.graph.nodes if node.target is RowQuantCall.target]
    assert quantize.args[0].meta["val"].dtype == torch.float16
    assert quantize.args[0].target is (torch.ops.aten.mul.Tensor if not gathered else torch.ops.aten.to.dtype)
    got, want = found(*inputs)[0], program(*inputs)[0]
    assert torch.equal(got, want) and not got[3].any()


def indices():
    return torch.tensor([3, 3, 0, 1]), torch.tensor([1, 3], dtype=torch.int32)


class QuantizedRows(torch.nn.Module):
    """Quantized rows of x, that an index chooses, by the weights of two experts."""

    def __init__(self, form, act, k, choose=lambda x, rows: x[rows]):
        super().__init__()
        q = quantize_tensor(torch.randn(2, 24, k), Format.parse(form))
        self.codes, self.scale = (torch.nn.Buffer(part) for part in q.stored_parts[:2])
        self.form, self.act, self.k, self.choose = form, act, k, choose

    def forward(self, x, rows, ends):
        codes, scale, zero = torch.ops.qcompile.quantize(self.choose(x.half(), rows), self.act)
        rows = codes, scale, zero if "zero" in self.act else None
        stored = self.codes, self.scale, None, None
        return torch.ops.qcompile.qexperts(*rows, ends, *stored, self.form, self.act, self.k, torch.float16)


@pytest.mark.parametrize(
    "form,gpu,why",
    [
        ("fp8/row", Gpu(), "no kernel for fp8/row weights by float x"),
        ("int4/group128/zero", Gpu(capability=(7, 5)), "needs sm_80, this is sm_75"),
    ],
)
def test_a_stack_without_a_kernel_stays_and_the_report_says_why(form, gpu, why):
    program = capture(build("mixtral").half(), *widen_batch((), example("mixtral")))
    recipe = Recipe("experts", (Quantize(Format.parse(form), None), Fuse()))
    quantized, _ = run(program, recipe, verify=False)
    chosen = lower_to_gpu(quantized, make_always, gpu)
    assert len(list(QExpertsCall.find(quantized))) == 4
    experts = {label for site, by_rows in chosen.items() if "experts" in site for label in by_rows.values()}
    assert experts == {f"dequantize, then cuBLAS ({why})"}


class Routed(torch.nn.Module):
    """Rows of x that an index chooses, by the weights of two experts."""

    def __init__(self, choose):
        super().__init__()
        q = quantize_tensor(torch.randn(2, 24, 64), Format.parse("int8/row"))
        self.codes, self.scale = (torch.nn.Buffer(part) for part in q.stored_parts[:2])
        self.choose = choose

    def forward(self, x, rows, ends):
        y = self.choose(x, rows)
        stored = self.codes, self.scale, None, None
        return torch.ops.qcompile.qexperts(y, None, None, ends, *stored, "int8/row", "", 64, x.dtype)


@pytest.mark.parametrize(
    "choose,gathered",
    [(lambda x, rows: x[rows], True), (lambda x, rows: x * 2, False), (lambda x, rows: x[x[:, 0] > -9], False)],
)
def test_only_rows_that_one_index_chooses_are_gathered_inside(choose, gathered):
    inputs = torch.randn(4, 64).half(), torch.tensor([3, 3, 0, 1]), torch.tensor([1, 3], dtype=torch.int32)
    program = capture(Routed(choose), inputs)
    found = program.copy()
    lower_to_gpu(found, make_always)
    (call,) = [call for _, call in ExpertsWCall.find(found)]
    assert (call.rows is not None) == gathered
    got, want = (p(*inputs) for p in (found, program))
    got, want = (out[0] if isinstance(out, tuple) else out for out in (got, want))
    assert torch.allclose(got, want, rtol=2e-3, atol=2e-2) and not got[3].any()
