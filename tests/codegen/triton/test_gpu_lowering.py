"""Whole models in terms of the Triton operators: which, how many, and the same outputs."""

from __future__ import annotations

import pytest
import torch
from lowered_programs import compared, counts, fake_outputs, lowered, lowered_module, make_always
from stand_in import STAND_IN
from zoo import ZOO, build, example

from qcompile.codegen.triton.gpu_lowering import lower_to_gpu
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, LoRC, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

INT4 = Format.parse("int4/group128/zero")
FAST = ("llama", "gpt2", "bert")
MODELS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name, recipe):
    found, inputs, chosen = compared(name, recipe)
    assert "dialect" not in counts(found) and set(chosen) and "dequantize, then" not in str(chosen)
    on_gpu = fake_outputs(found, inputs)
    assert [tuple(o.shape) for o in on_gpu] == [tuple(o.shape) for o in found(*inputs)]
    assert {o.device.type for o in on_gpu} == {"cuda"}


@pytest.mark.parametrize(
    "name,recipe,want",
    [
        # two layers of four products (q, k and v are one, and gate and up): norms before attention and feed-forward, a
        # gate, sums behind both
        ("llama", "int8", dict(row_quant=8, rms=4, gate=2, none=2, linear_a8=8, linear_w=1, residual=4)),
        ("llama", "int8-rotated", {"row_quant": 8, "rms": 4, "gate": 2, "hadamard": 2, "none": 2} | dict(
            linear_a8=8, linear_w=1, residual=4)),
        ("llama", "w4a16", dict(linear_w=9, residual=4)),
        ("gpt2", "w4a8", dict(row_quant=8, layer=4, none=4, linear_w4a8=8, linear_w=1, residual=4)),
        ("llama", "fp8", dict(row_quant=8, rms=4, gate=2, none=2, linear_a8=8, linear_w=1, residual=4)),
        # int4 codes by int4 or int8 ones, with scales of groups of the weights, and of x
        *(("llama", recipe, dict(row_quant=8, rms=4, gate=2, none=2, hadamard=2, linear_group=8, linear_w=1,
                                 residual=4)) for recipe in ("w4a4-rrs", "w4a4-groups", "w4a4-rotated")),
        ("llama", "w4a4", dict(row_quant=8, rms=4, gate=2, none=2, linear_group=8, linear_w=1, residual=4)),
        ("llama", "w4a8-lorc", dict(
            row_quant=8, rms=4, value=6, gate=2, none=2, linear_group=14, linear_w=1, up=15, residual=4)),
        ("llama", "fp4-fp8", dict(
            row_quant=8, rms=4, value=6, gate=2, none=2, linear_group=14, linear_w=1, up=15, residual=4)),
        # a statistic of the whole sequence, which no kernel of rows has
        ("llama", "w4a4-rrs-sequence", dict(dialect=8, linear_group=8, linear_w=1, residual=4)),
        # scales of 16 bits become float32 for the kernels
        ("llama", "serve-fp8", dict(row_quant=8, rms=4, gate=2, none=2, linear_a8=8, residual=4)),
        # norms behind the sums: what is quantized is read by the sum too, so the kernel writes both
        ("bert", "int8", dict(row_quant=8, layer=4, value=4, none=4, linear_a8=8, linear_w=1, residual=4)),
    ],
)  # fmt: skip
def test_what_is_fused(name, recipe, want):
    assert counts(compared(name, recipe)[0]) == want


def test_a_correction_is_an_epilogue():
    int4 = Format.parse("int4/group32/zero")
    recipe = Recipe("lorc", (Quantize(int4, None), LoRC(rank=4), Fuse()))
    program, found, inputs, _ = lowered(build("llama").half(), example("llama"), recipe)
    assert counts(found) == dict(linear_w=15, up=15, residual=4)
    want, got = program(*inputs)[0].float(), found(*inputs)[0].float()
    assert float((got - want).norm()) <= 2e-3 * float(want.norm())


def test_formats_without_a_kernel_are_dequantized():
    fp4 = Format.parse("fp4/group32")
    recipe = Recipe("fp4", (Quantize(fp4, None, lm_head=fp4), Fuse()))
    program, found, inputs, chosen = lowered(build("llama").half(), example("llama"), recipe)
    says = "dequantize, then cuBLAS (no kernel for fp4/group32 weights by float x)"
    assert {label for by_rows in chosen.values() for label in by_rows.values()} == {says}
    assert torch.allclose(program(*inputs)[0].float(), found(*inputs)[0].float(), atol=2e-3)


@pytest.mark.parametrize(
    "form,operator,kernel",
    [
        ("int4/group32/zero/dual", "linear_w4a8", "gemm_w4a8"),
        ("int4/group64/dual", "linear_w4a8", "gemm_w4a8"),
        ("int4/row/zero", "linear_w4a8", "gemm_w4a8"),
        ("int4/group16/zero/dual", "linear_a8", "gemm_a8, int8 of dual codes"),
    ],
)
def test_4_bit_codes_by_int8_stay_packed(form, operator, kernel):
    weight, int8 = Format.parse(form), Format("int8")
    recipe = Recipe("w4a8", (Quantize(weight, int8, lm_head=weight, lm_head_act=int8), Fuse()))
    program, found, inputs, chosen = lowered(build("llama").half(), example("llama"), recipe)
    assert counts(found)[operator] == 9
    alone = f"{kernel} (not measured on this GPU)"
    labels = {label for by_rows in chosen.values() for label in by_rows.values()}
    assert labels == {alone, *(f"{alone}, {count} sites in one product" for count in (2, 3))}
    want, got = program(*inputs)[0].float(), found(*inputs)[0].float()
    assert float((got - want).norm()) <= 3e-2 * float(want.norm())
    expanded = [name for name, t in found.weights.items() if name.endswith(".int8.0")]
    packed = [t for name, t in found.weights.items() if name.endswith(".linear_w4a8.0")]
    assert (len(expanded), len(packed)) == ((0, 9) if operator == "linear_w4a8" else (9, 0))
    assert {t.dtype for t in packed} <= {torch.uint8}


def test_codes_that_something_else_reads_keep_their_zero_points():
    """A site whose weight no kernel multiplies by them reads codes and zero points of the same quantize."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

        def forward(self, x):
            return self.a(x), self.b(x)

    act, x = Format.parse("int4/group64/zero"), torch.randn(3, 64).half()
    other = Rule("b.weight", weight=Format.parse("int8/group64"), act=act)
    int4 = Format.parse("int4/group64")
    recipe = Recipe("two", (Quantize(int4, act, lm_head=int4, lm_head_act=act), Fuse()), (other,))
    program, found = lowered_module(Two(), x, recipe)
    assert counts(found) == dict(linear_group=1, dialect=1)
    for got, want in zip(found(x), program(x), strict=True):
        assert torch.allclose(got, want, atol=2e-2)


def test_fp8_matmuls_need_a_gpu_that_has_them():
    found = lowered(build("llama").half(), example("llama"), "fp8", gpu=Gpu(capability=(8, 0)))[1]
    assert counts(found) == dict(dialect=8, linear_w=1)  # nor casts to it


def test_fp4_by_fp8_needs_one_too_and_the_report_says_so():
    _, found, _, chosen = lowered(build("llama").half(), example("llama"), "fp4-fp8", gpu=Gpu(capability=(8, 6)))
    assert "linear_group" not in counts(found)
    assert "dequantize, then cuBLAS (needs sm_89, this is sm_86)" in str(chosen)
    _, found, _, chosen = lowered(build("llama").half(), example("llama"), "fp4-fp8", gpu=Gpu(capability=(8, 9)))
    assert counts(found)["linear_group"] == 14 and "gemm_fp4_fp8 (not measured on this GPU)" in str(chosen)


def test_another_consumer_keeps_its_value():
    """A linear layer that two read cannot take the sum of one into its epilogue; a norm's value is written for both."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
            self.norm = torch.nn.RMSNorm(64)

        def forward(self, x):
            y = self.norm(x)
            z = self.a(y)
            return self.b(z + x) + y, z

    int8, x = Format("int8"), torch.randn(3, 64).half()
    recipe = Recipe("two", (Quantize(int8, int8, lm_head=int8, lm_head_act=int8), Fuse()))
    program, found = lowered_module(Two(), x, recipe)
    assert counts(found) == dict(row_quant=2, rms=1, value=1, none=1, linear_a8=2, residual=1)
    for got, want in zip(found(x), program(x), strict=True):
        assert torch.allclose(got, want, atol=2e-2)


def test_the_report_says_what_was_not_measured(own_cache):
    program = capture(torch.nn.Linear(128, 64).bfloat16(), (torch.randn(20, 128).bfloat16(),))
    quantized, _ = run(program, Recipe("all", (Quantize(INT4, None, lm_head=INT4), Fuse())), verify=False)
    chosen = lower_to_gpu(quantized, make_always, STAND_IN)
    assert chosen == {"weight": {"rows 20 (dynamic)": "gemm_w (not measured on this GPU)"}}


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "falcon"))])
@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
def test_free_sizes_stay_free(name, recipe):
    """Lowered once for any batch and length: nothing is fixed to the sizes that were traced."""
    program, found, _, _ = lowered(build(name).half(), example(name), recipe)
    assert counts(found)["residual"] > 0
    for shape in ((1, 1), (3, 11)):
        ids = torch.randint(3, 128, shape)
        got, want = found(ids)[0].float(), program(ids)[0].float()
        assert got.shape == want.shape and float((got - want).norm()) < 3e-2 * float(want.norm())
