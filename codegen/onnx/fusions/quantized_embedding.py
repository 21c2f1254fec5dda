"""An embedding that gathers rows of a quantized table: what the file holds in the place of the module's own table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qcompile.numerics.qtensor import QTensor


@dataclass(frozen=True)
class QuantizedEmbedding:
    """A table [V, K] that is gathered from codes.

    Attributes:
        name: attribute path of the table.
        values: what the file's rows are, [V, K] float32.
        matrix: [K, K], as a linear's weight, that gathered rows are multiplied by: values = gathered @ matrix.T.
            Quantized or float; None: no such product.
        error_ratio: how far `values` are from the table, as a multiple of the error of quantizing the table itself.
    """

    name: str
    values: Tensor
    matrix: QTensor | Tensor | None = None
    error_ratio: float = 1.0
