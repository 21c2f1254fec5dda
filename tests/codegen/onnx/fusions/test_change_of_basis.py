"""A table as a quantized one times a matrix: only where that is near, for every row."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.onnx.fusions.change_of_basis import fit_change_of_basis, fit_matrix, least_squares_matrix
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor


def test_the_nearest_matrix_is_the_one_that_folding_and_rotating_made():
    torch.manual_seed(0)
    table, gain, rotation = torch.randn(9000, 24), torch.rand(24) + 0.5, torch.linalg.qr(torch.randn(24, 24)).Q
    want = rotation.t() @ torch.diag(1 / gain) @ rotation
    assert torch.allclose(least_squares_matrix(table * gain @ rotation, table @ rotation), want, atol=1e-5)
    flat = torch.cat([table, torch.zeros(9000, 1)], 1)  # a channel that is zero everywhere
    assert torch.allclose(flat @ least_squares_matrix(flat, flat), flat, atol=1e-5)


def test_a_matrix_must_come_near_to_every_row():
    torch.manual_seed(0)
    table, rotation = torch.randn(2000, 24), torch.linalg.qr(torch.randn(24, 24)).Q
    form = Format.parse("int4/group32/zero")
    table[5] = 0  # of a token that is not used
    values = quantize_tensor(table @ rotation, form).dequantize()
    found = fit_change_of_basis("table", table, values, form)
    assert found is not None and torch.equal(found.values, values @ found.matrix.dequantize().t())
    own_error = float((quantize_tensor(table, form).dequantize() - table).norm())
    assert found.error_ratio == pytest.approx(float((found.values - table).norm()) / own_error)
    assert found.error_ratio < 1.3
    assert fit_change_of_basis("table", table[:47], values[:47], form) is None, "the table is too short: less than 2 K"
    other = table.clone()
    other[7] += 0.6 * torch.randn(24) * table[7].norm() / 24**0.5  # near on the whole, one token far off
    assert fit_matrix(other, values, form) is None
    assert fit_change_of_basis("table", torch.randn(2000, 24), values, form) is None
