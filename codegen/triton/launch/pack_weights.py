"""A stored weight as the kernels read it, made on the device that holds it.

On a GPU the kernel `pack` reads the stored bits and writes packed bytes: once through memory, where plain torch would
unpack each code to a byte, or for three bits to three. On a CPU plain torch is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.spec import Pack
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout, layout_of, pack_weight
from qcompile.codegen.triton.launch.gemm import run
from qcompile.codegen.triton.launch.tiles import launch_of
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import unpack_codes


def prepare(
    stored: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, form: Format, k: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A stored weight -> bytes, scales [groups, N] float32 and zero points [groups, N], on its device.

    The two levels of scales of a dual format are multiplied.

    Args:
        stored: codes [N, ..] as QTensor.stored() packs them.
        scale: [N, groups] or [N, 1].
        zero: [N, groups], or None.
        group_scale: [N, groups] of a dual format, or None.
        form: of the codes.
        k: columns.

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
    return packed, groups_first(scales), points


def pack_by_torch(stored: Tensor, form: Format, layout: WeightLayout, k: int) -> Tensor:
    """Stored codes -> bytes [N, blocks x bytes of a block], in torch on any device."""
    codes = unpack_codes(stored, form, k)
    return pack_weight(codes if form.qmin == 0 else (codes.to(torch.int16) - form.qmin).to(torch.uint8), layout)


def pack_by_kernel(stored: Tensor, form: Format, layout: WeightLayout, k: int) -> Tensor:
    """The same by the kernel."""
    signed = form.bits == 8 and form.qmin < 0
    spec = Pack(bits=layout.bits, group=0, chunk=layout.chunk, signed=signed)
    data, n, blocks = stored.contiguous().view(torch.uint8), len(stored), -(-k // layout.block)
    out = torch.empty(n, blocks * layout.block * layout.bits // 8, dtype=torch.uint8, device=stored.device)
    if not n:
        return out
    launch = launch_of(spec)
    grid = (min(8, blocks), -(-n // launch.block_n))
    run(spec, grid, launch, stored=data, out=out, N=n, K=k, width=data.shape[1], blocks=blocks)
    return out


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
