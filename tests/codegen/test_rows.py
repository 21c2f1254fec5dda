"""M of a value, fixed and symbolic."""

from __future__ import annotations

import torch

from qcompile.codegen.rows import rows_label, rows_of
from qcompile.ir.capture import capture


def output_of(program):
    return program.outputs[0]


def test_leading_dimensions_are_multiplied():
    node = output_of(capture(torch.nn.Linear(8, 4), (torch.randn(3, 5, 8),)))
    assert rows_of(node)[0] == 15


def test_a_symbolic_size_is_judged_at_its_hint():
    node = output_of(capture(torch.nn.Linear(8, 4), (torch.randn(20, 8),)))
    rows, symbolic = rows_of(node)
    assert rows == 20 and symbolic and rows_label(node) == "rows 20 (dynamic)"


def test_a_vector_is_one_row():
    class Sum(torch.nn.Module):
        def forward(self, x):
            return x.sum(0)

    node = output_of(capture(Sum(), (torch.randn(20, 8),)))
    assert rows_of(node) == (1, False) and rows_label(node) == "rows 1"


def test_rows_that_depend_on_data_are_many():
    class Chosen(torch.nn.Module):
        def forward(self, x):
            return x[x[:, 0] > 0] * 2

    rows, symbolic = rows_of(output_of(capture(Chosen(), (torch.randn(20, 8),))))
    assert rows > 1000 and symbolic
