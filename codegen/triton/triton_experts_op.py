"""qcompile_triton::experts_w, the kernel of a stack of expert weights as an operator of torch.

As the operators of triton_ops.py: on CUDA the kernel, which reads on the GPU where each expert's rows end; on a CPU its
own definition in plain torch.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.codegen.triton.decided_calls import decided, dense, on_device
from qcompile.codegen.triton.define_op import TritonOp
from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.experts_spec import GemmExperts
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout, split_scales, unpack_weight
from qcompile.codegen.triton.launch.experts import ExpertSizes, plan_experts
from qcompile.codegen.triton.launch.gemm import PackedWeight, gpu
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan
from qcompile.codegen.triton.triton_experts_checks import check_experts_w
from qcompile.ir.op_checks import check_ends
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import expand_groups


def product_by_expert(x: Tensor, ends: Tensor, stack: Tensor) -> Tensor:
    """Rows [S, K], sorted by expert, times the transposed weight [E, N, K] of each one's expert; zeros behind the last.

    Raises:
        ValueError: ends that fall, or lie behind the rows.
    """
    lasts = ends.tolist()
    check_ends(lasts, len(x))
    out = stack.new_zeros(len(x), stack.shape[1])
    for first, last, matrix in zip([0, *lasts], lasts, stack, strict=False):
        out[first:last] = x[first:last] @ matrix.t()
    return out


@TritonOp
def experts_w(
    x: Tensor, rows: Tensor | None, ends: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, format: str,
    columns: int,
) -> Tensor:  # fmt: skip
    """Rows of x, sorted by expert, times the weight of each row's expert; rounded once.

    Args:
        x: [T, K] bf16 or fp16.
        rows: int32 or int64 [S]: row i of the product is row rows[i] of x; None is all rows of x in their order.
        ends: int32 or int64 [E], one past the last row of each expert, rising.
        packed: of the stack as one weight [E N, K], as prepare_experts makes it.
        scale: of the stack, as prepare_experts makes it.
        zero: of the stack, as prepare_experts makes it.
        format: of the codes.
        columns: K.

    Returns:
        [S, N] in x's dtype; rows beyond the last end are zero.
    """

    def decide() -> tuple[GemmPlan | None, int, int]:
        weight = PackedWeight(packed, scale, zero, checked(), columns)
        experts, count = len(ends), len(x if rows is None else rows)
        sizes = ExpertSizes(count, len(x), experts, len(packed) // experts, columns)
        spec = GemmExperts(NAMES[x.dtype], **weight.spec_fields, gather=rows is not None)
        empty = not sizes.rows or not sizes.channels
        return None if empty else plan_experts(gpu(x.device), spec, sizes), count, sizes.channels

    def checked() -> WeightLayout:
        return check_experts_w(x, rows, ends, packed, scale, zero, format, columns)

    tensors = dense(x, rows, ends, packed, scale, zero)
    plan, count, channels = decided(tensors, ("experts_w", format, columns), decide)
    out = x.new_empty(count, channels)
    if plan is None:
        return out
    with on_device(x):
        return plan.run((*tensors, None, None), out, count, channels)


@experts_w.on_cpu
def _(
    x: Tensor, rows: Tensor | None, ends: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, format: str,
    columns: int,
) -> Tensor:  # fmt: skip
    layout = check_experts_w(x, rows, ends, packed, scale, zero, format, columns)
    form, experts = Format.parse(format), len(ends)
    source = x if rows is None else x[rows]
    if not scale.is_floating_point():
        scale, zero = split_scales(scale)
    points = 2.0 ** (form.bits - 1) if zero is None else expand_groups(zero.t().float(), form, columns)
    weight = (unpack_weight(packed, layout, columns).float() - points) * expand_groups(scale.t(), form, columns)
    return product_by_expert(source.float(), ends, weight.unflatten(0, (experts, -1))).to(x.dtype)


@experts_w.on_fake
def _(
    x: Tensor, rows: Tensor | None, ends: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, format: str,
    columns: int,
) -> Tensor:  # fmt: skip
    check_experts_w(x, rows, ends, packed, scale, zero, format, columns)
    return x.new_empty((x if rows is None else rows).shape[0], packed.shape[0] // ends.shape[0])
