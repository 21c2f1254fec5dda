"""qcompile::project_gradient: the gradient of a low-rank parameter, and the basis that it is in.

The backward of low_rank_linear calls it. Where a new basis is due, it is found from the gradient of this backward, and
the state changes in place: the operator decides at run time, so layers with intervals of their own cause no second
compilation. Under an initialized process group the gradient that a basis comes from is summed over the group, so that
all ranks get the same basis.

Source: Q-GaLore (arXiv:2407.08296); see numerics/low_rank.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.low_rank import is_left, next_gap, project, similarity, singular_basis
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

STEP, GAP, REFRESHES, DUE = range(4)
"""The schedule, int64 [4]: optimizer steps so far; steps between two bases; bases so far; 1 where the next backward
has to find one."""


def stored_basis(basis: Tensor, scale: Tensor | None, zero: Tensor | None, form: str, length: int) -> Tensor:
    """The float basis [r, length] of its stored parts; `form` is "" where it is stored as it is."""
    if not form:
        return basis
    assert scale is not None
    return QTensor.from_stored((basis, scale, zero, None), Format.parse(form), length).dequantize()


@torch.library.custom_op(
    "qcompile::project_gradient",
    mutates_args=("basis", "basis_scale", "basis_zero", "first", "similarities", "schedule"),
)
def project_gradient(
    x: Tensor,
    gradient: Tensor,
    basis: Tensor,
    basis_scale: Tensor | None,
    basis_zero: Tensor | None,
    first: Tensor,
    similarities: Tensor,
    schedule: Tensor,
    basis_format: str,
    threshold: float,
    factor: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of L; where a new basis is due, it is found first, from this gradient.

    A gradient with NaN or Inf, of nothing but zeros, or whose decomposition does not converge keeps the basis, and the
    next backward tries again. In the first two cases what such a backward adds to an accumulated gradient is not finite
    or zero, so that no sum is of two bases.

    Args:
        x: [T, K].
        gradient: of the product, [T, N], of the same dtype.
        basis: as of low_rank_linear, and so are the rest.
        basis_scale: its scale, or None.
        basis_zero: its zero point, or None.
        first: changed with the basis.
        similarities: changed with the basis.
        schedule: changed with the basis.
        basis_format: of the basis, or "".
        threshold: of the similarities.
        factor: of the interval.
        dtype: of L.

    Returns:
        [N, r], or [r, K] where N < K.
    """
    left = is_left(gradient.shape[1], x.shape[1])
    if int(schedule[DUE]):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        full = gradient.to(wide).t() @ x.to(wide)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(full)
        new = singular_basis(full, basis.shape[0], left)
        if new is not None:
            _decide_gap(new[0], first, similarities, schedule, threshold, factor)
            _store(new, basis, basis_scale, basis_zero, basis_format)
    length = first.shape[0]
    vectors = stored_basis(basis, basis_scale, basis_zero, basis_format, length).to(x.dtype)
    return project(x, gradient, vectors, left).to(dtype)


@project_gradient.register_fake
def _(
    x: Tensor,
    gradient: Tensor,
    basis: Tensor,
    basis_scale: Tensor | None,
    basis_zero: Tensor | None,
    first: Tensor,
    similarities: Tensor,
    schedule: Tensor,
    basis_format: str,
    threshold: float,
    factor: int,
    dtype: torch.dtype,
) -> Tensor:
    rows, columns, rank = gradient.shape[1], x.shape[1], basis.shape[0]
    return x.new_empty((rank, columns) if is_left(rows, columns) else (rows, rank), dtype=dtype)


def _decide_gap(
    new: Tensor, first: Tensor, similarities: Tensor, schedule: Tensor, threshold: float, factor: int
) -> None:
    """Compare the first vector of a new basis with that of the old one, and decide when the next basis is due."""
    before = int(schedule[REFRESHES])
    if before:
        alike = similarity(first.to(new.dtype), new)
        similarities.copy_(torch.cat([similarities[1:], similarities.new_tensor([alike])]))
        schedule[GAP] = next_gap(int(schedule[GAP]), similarities, before, threshold, factor)
    schedule[REFRESHES] = before + 1
    schedule[DUE] = 0
    first.copy_(new)


def _store(new: Tensor, basis: Tensor, scale: Tensor | None, zero: Tensor | None, basis_format: str) -> None:
    """Put a new basis, float [r, ..], in the place of the old one."""
    if not basis_format:
        basis.copy_(new)
        return
    assert scale is not None
    codes, new_scale, new_zero, _ = quantize_tensor(new, Format.parse(basis_format)).stored_parts
    basis.copy_(codes)
    scale.copy_(new_scale)
    if zero is not None:
        assert new_zero is not None
        zero.copy_(new_zero)
