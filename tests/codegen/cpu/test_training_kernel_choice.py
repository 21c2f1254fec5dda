"""Which kernel trains a site, and how fast by the committed measurements."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu import training_kernel_choice as subject
from qcompile.codegen.cpu.training_kernel_choice import TrainingShape, choose_training_kernel, training_ratios

KERNELS = {"fixed_point_linear", "fixed_point_conv", "fixed_point_conv_narrow", "fixed_point_conv_grouped"}


@pytest.mark.parametrize("measured_on", ["vnni", "avx2"])
def test_every_kernel_was_measured(measured_on):
    table = training_ratios(measured_on)
    assert set(table) == {(kernel, dtype) for kernel in KERNELS for dtype in ("bfloat16", "float32")}
    assert all(shape.kernel == kernel for (kernel, _), found in table.items() for shape in found)
    linears = {shape.rows for shape in table["fixed_point_linear", "float32"]}
    assert {32, 128, 512, 2048} <= linears
    dimensions = {shape.dimensions for (kernel, _), found in table.items() if "conv" in kernel for shape in found}
    assert dimensions == {1, 2}


def test_choices():
    large, small = TrainingShape(2048, 2048, 2048), TrainingShape(32, 64, 64)
    choice = choose_training_kernel(large, torch.float32)
    assert choice.kernel == "fixed_point_linear" and choice.ratio > 1.5 and "x float)" in str(choice)
    assert choose_training_kernel(small, torch.float32).slower_than_float
    assert choose_training_kernel(TrainingShape(8192, 1, 128, 9, 1, 2, 128), torch.float32).slower_than_float


def test_a_kernel_is_that_of_the_form():
    convolution = TrainingShape(1024, 64, 64, 9, 1, 2)
    assert convolution.kernel == "fixed_point_conv"
    assert (
        convolution._replace(inputs=63).kernel == convolution._replace(outputs=63).kernel == "fixed_point_conv_narrow"
    )
    assert convolution._replace(groups=2).kernel == "fixed_point_conv_grouped"


def test_a_dtype_that_was_not_measured_is_not_slower():
    choice = choose_training_kernel(TrainingShape(32, 64, 64), torch.float16)
    assert choice.ratio is None and str(choice) == "fixed_point_linear" and not choice.slower_than_float


def test_a_processor_has_its_table(monkeypatch):
    def ratios(measured_on):
        return {("fixed_point_linear", "float32"): {TrainingShape(1, 64, 64): 7.0 if measured_on == "avx2" else 3.0}}

    monkeypatch.setattr(subject, "training_ratios", ratios)
    expected = {"vnni": "3.0x float)", "avx2": "7.0x float)", "other": "float on avx2)", "amx": "float on vnni)"}
    for kind, note in expected.items():
        monkeypatch.setattr(subject, "processor", lambda kind=kind: kind)
        assert str(choose_training_kernel(TrainingShape(4, 64, 64), torch.float32)).endswith(note)


def test_the_nearest_measured_shape_counts(monkeypatch):
    base = TrainingShape(1024, 64, 64, 9, 1, 2)
    others = [base, base._replace(rows=64), base._replace(inputs=256, outputs=256), base._replace(taps=1),
              base._replace(stride=2), base._replace(dimensions=1)]  # fmt: skip
    measured = {shape: float(index) for index, shape in enumerate(others)}
    monkeypatch.setattr(subject, "training_ratios", lambda measured_on: {("fixed_point_conv", "float32"): measured})

    def ratio(**changes):
        return choose_training_kernel(base._replace(**changes), torch.float32).ratio

    assert [ratio(rows=900), ratio(rows=80), ratio(inputs=200, outputs=200), ratio(taps=2)] == [0.0, 1.0, 2.0, 3.0]
    assert [ratio(stride=2), ratio(dimensions=1, rows=9, inputs=900)] == [4.0, 5.0]
