"""A stored weight as the kernels read it, made on the device that holds it.

On a GPU the kernel `pack` reads the stored bits and writes packed bytes: once through memory, where plain torch would
unpack each code to a byte, or for three bits to three. On a CPU plain torch is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.spec import Pack, Zero
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout, join_scales, layout_of, pack_weight
from qcompile.codegen.triton.launch.gemm import run
from qcompile.codegen.triton.launch.tiles import launch_of
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import unpack_codes


def prepare(
    stored: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, form: Format, k: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """A stored weight -> packed words, scales [groups, N] float32 and zero points [groups, N], on its device.

    The two levels of scales of a dual format are multiplied. For x in bfloat16, scales and zero points of groups are
    one word (`pairs_scales`), and the zero points None.

    Args:
        stored: codes [N, ..] as QTensor.stored() packs them.
        scale: [N, groups] or [N, 1].
        zero: [N, groups], or None.
        group_scale: [N, groups] of a dual format, or None.
        form: of the codes.
        k: columns.
        dtype: of x.

    Raises:
        ValueError: no kernel reads the format.
    """
    layout = layout_of(form)
    if layout is None:
        raise ValueError(f"{form}: no kernel reads this format")
    scales = scale.float() if group_scale is None else scale.float() * group_scale.float()
    padded_k = -(-k // layout.block) * layout.block
    groups = -(-padded_k // layout.group) if layout.group else 1

    def groups_first(of: Tensor) -> Tensor:
        return torch.nn.functional.pad(of.t(), (0, 0, 0, max(0, groups - of.shape[1]))).contiguous()

    points = None if zero is None else groups_first(zero if form.zero == "int" else zero.float())
    packed = pack_by_kernel(stored, form, layout, k) if _on_gpu(stored) else pack_by_torch(stored, form, layout, k)
    if pairs_scales(form, dtype):
        return packed, join_scales(groups_first(scales), points, form.bits), None
    return packed, groups_first(scales), points


def pairs_scales(form: Format, dtype: torch.dtype) -> bool:
    """Whether scale and zero point of a group are one word: what bfloat16 holds exactly, but for float32 scales.

    A float32 scale is rounded to bfloat16, an error of 2^-9 beside the 2^-9 of every value of x.
    """
    return dtype == torch.bfloat16 and form.group > 0 and form.zero != "float" and form.bits <= 4


def zero_points_of(form: Format, dtype: torch.dtype) -> Zero:
    """The field `zero` of kernels that read a weight: paired words always have zero points."""
    return "int" if pairs_scales(form, dtype) else form.zero


def pack_by_torch(stored: Tensor, form: Format, layout: WeightLayout, k: int) -> Tensor:
    """Stored codes -> packed words (weight_layout.py), in torch on any device."""
    codes = unpack_codes(stored, form, k)
    return pack_weight(codes if form.qmin == 0 else (codes.to(torch.int16) - form.qmin).to(torch.uint8), layout)


def pack_by_kernel(stored: Tensor, form: Format, layout: WeightLayout, k: int) -> Tensor:
    """The same by the kernel."""
    signed = form.bits == 8 and form.qmin < 0
    bytewise = layout.bits == 4 and layout.word == 8
    spec = Pack(bits=layout.bits, group=0, chunk=layout.chunk, signed=signed, bytewise=bytewise)
    data, n, blocks = stored.contiguous().view(torch.uint8), len(stored), -(-k // layout.block)
    out = torch.empty(n, layout.words(k), dtype=layout.dtype, device=stored.device)
    if not n:
        return out
    launch = launch_of(spec)
    grid = (min(8, blocks), -(-n // launch.block_n))
    run(spec, grid, launch, stored=data, out=out, N=n, K=k, width=data.shape[1], blocks=blocks)
    return out


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
