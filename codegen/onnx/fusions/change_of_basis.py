"""A table as a quantized one times a matrix: least squares, and whether that is near enough.

Codes of a tied weight may be those of the table in another basis: rotating and folding a norm's gain g make E R of the
table and E diag(g) R of the logits' weight, so one is the other times R^T diag(1/g) R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.onnx.fusions.quantized_embedding import QuantizedEmbedding
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

MAX_ERROR_RATIO = 1.5  # of a table behind a matrix: times the error of quantizing the table itself,
MAX_ROW_ERROR_RATIO = 4.0  # and of any one of its rows
MATRIX_FORMAT = Format.parse("int8/group64")  # its scales are an eighteenth of those of 4 bits

_TINY = 1e-30
_CHUNK = 8192  # rows that are converted to float64 at once


def fit_change_of_basis(name: str, table: Tensor, values: Tensor, form: Format) -> QuantizedEmbedding | None:
    """A table as `values` times a matrix, if that is about as near as the table quantized to `form`.

    Args:
        name: of the table.
        table: [V, K] float32.
        values: [V, K] float32, dequantized.
        form: of the codes behind `values`; below 8 bits the matrix is quantized to 8.

    Returns:
        The embedding, or None: no matrix comes near, or the table is too short to tell.
    """
    k = table.shape[1]
    if len(table) < 2 * k:
        return None  # some matrix comes near to any table so short
    stride = len(table) // (4 * k)
    if stride > 1 and fit_matrix(table[::stride], values[::stride], form) is None:
        return None  # an early exit: a matrix comes nearer to a part of the rows than to all of them
    if (fit := fit_matrix(table, values, form)) is None:
        return None
    matrix, error_ratio = fit
    return QuantizedEmbedding(name, _times(values, matrix), matrix, error_ratio)


def fit_matrix(table: Tensor, values: Tensor, form: Format) -> tuple[QTensor | Tensor, float] | None:
    """The nearest matrix, and its error as a multiple of the table's own quantization error; None: too far."""
    nearest = least_squares_matrix(values, table).t()
    matrix = quantize_tensor(nearest, MATRIX_FORMAT) if form.bits < MATRIX_FORMAT.bits else nearest
    error = (_times(values, matrix) - table).norm(dim=1)
    own_error = (quantize_tensor(table, form).dequantize() - table).norm(dim=1)
    error_ratio = float(error.norm() / own_error.norm())
    outliers = error > MAX_ROW_ERROR_RATIO * own_error.clamp_min(own_error.mean())
    return None if not error_ratio <= MAX_ERROR_RATIO or bool(outliers.any()) else (matrix, error_ratio)


def least_squares_matrix(values: Tensor, table: Tensor) -> Tensor:
    """The matrix A [K, K] with the least |values A - table|, both [V, K]; solved in float64.

    Columns that are zero everywhere, or depend on others, leave it undetermined: a little damping decides.
    """
    k = values.shape[1]
    gram, cross = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    for rows, targets in zip(values.split(_CHUNK), table.split(_CHUNK), strict=True):
        wide = rows.double()
        gram += wide.t() @ wide
        cross += wide.t() @ targets.double()
    mean_diagonal = gram.diagonal().mean().clamp_min(_TINY)
    for damping in (1e-9, 1e-6, 1e-3):
        factor, failed = torch.linalg.cholesky_ex(gram + damping * mean_diagonal * torch.eye(k, dtype=torch.float64))
        if not int(failed):
            break
    return torch.cholesky_solve(cross, factor).float()


def _times(values: Tensor, matrix: QTensor | Tensor) -> Tensor:
    return values @ (matrix if isinstance(matrix, Tensor) else matrix.dequantize()).t()
