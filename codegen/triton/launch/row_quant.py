"""Run row_quant: a norm or a gate, smoothing and a Hadamard transform, then codes and scales of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.render import padded
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.launch.kernel_call import KernelCall
from qcompile.codegen.triton.launch.tiles import Launch
from qcompile.numerics.hadamard import hadamard_factors, hadamard_matrix

_CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.int8}
MAX_K = 32768  # values of a row that one program keeps in registers


TENSORS = ("x", "residual", "gate", "gain", "shift", "smooth", "signs", "left", "right",
           "codes", "scale", "total", "value")  # fmt: skip
"""Names of the kernel's tensors, in the order in which plans take them; the last four are results."""

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""codes [.., K], scale [.., groups] float32, total and value [.., K] or empty."""


class RowQuantLaunch(KernelCall):
    """A launch of row_quant."""

    names = TENSORS


class RowQuantPlan(NamedTuple):
    """What quantizing x [.., K] of M rows launches.

    Attributes:
        spec: what is computed.
        call: the launch; None without rows.
    """

    spec: RowQuant
    call: RowQuantLaunch | None

    def run(self, tensors: Sequence[Tensor | None]) -> Results:
        """Launch on the current device and stream; tensors by the names of TENSORS, up to "codes"."""
        x, spec = tensors[0], self.spec
        assert x is not None
        *lead, k = x.shape
        codes = x.new_empty(*lead, k, dtype=_CODE_DTYPES[spec.codes])
        scale = x.new_empty(*lead, -(-k // spec.group) if spec.group else 1, dtype=torch.float32)
        total, value = (x.new_empty(x.shape if written else 0) for written in (spec.residual, spec.value))
        if self.call is not None:
            self.call((*tensors, codes, scale, total, value))
        return codes, scale, total, value


def row_stride(x: Tensor) -> int:
    """The distance of the rows of x [.., K] in memory; 0 where they are not evenly apart, or not dense themselves."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.stride(-1) != 1:
        return 0
    stride = after = 0
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size > 1 and (step == 0 or after and step != after):  # one row in place of many, or rows with gaps
            return 0
        if size > 1:
            stride, after = stride or step, step * size
    return stride or x.shape[-1]


def plan_row_quant(spec: RowQuant, m: int, k: int, eps: float, x_row: int = 0, gate_row: int = 0) -> RowQuantPlan:
    """Decide how rows are quantized.

    Args:
        spec: what to compute.
        m: rows.
        k: values of a row.
        eps: of the norm.
        x_row: distance of the rows of x in memory; 0 is k.
        gate_row: of those of the gate.
    """
    if not m:
        return RowQuantPlan(spec, None)
    launch = Launch(1, 1, num_warps(spec, k), 1)
    sizes = dict(K=k, x_row=x_row or k, gate_row=gate_row or k, BLOCK=max(spec.group, 1 << (k - 1).bit_length()))
    return RowQuantPlan(spec, RowQuantLaunch(spec, launch, (m,), eps=eps, **sizes))


def row_quant(spec: RowQuant, x: Tensor, eps: float = 0.0, **tensors: Tensor) -> Results:
    """Quantize the rows of x [M, K].

    Args:
        spec: what to compute.
        x: bf16 or fp16, contiguous.
        eps: of the norm.
        tensors: residual, gate [M, K], gain, shift, smooth, signs [K], left and right (transform_matrices), those that
            the spec has.
    """
    plan = plan_row_quant(spec, x.shape[0], x.shape[1], eps)
    with torch.cuda.device(x.get_device()):  # the current one may be another
        return plan.run((x, *(tensors.get(name) for name in TENSORS[1:-4])))


def num_warps(spec: RowQuant, k: int) -> int:
    """Some 16 values a thread; the matmuls of a transform take four warps, or eight.

    Half as many values a thread where `value` is written too: with more, ptxas spills some (sm_90, sm_100).
    """
    if spec.hadamard:
        return 4 if spec.hadamard <= 4096 else 8
    each = 256 if spec.value else 512
    return max(1, min(32, 1 << (k // each).bit_length() - 1)) if k >= each else 1


def fuses_hadamard(n: int, capability: tuple[int, int], group: int = 0) -> bool:
    """Whether a transform of n channels fits into row_quant on a GPU: into the registers of one program.

    On sm_100 triton 3.6 fails on its matmuls.

    Args:
        n: channels.
        capability: of the GPU.
        group: columns that share a scale, a power of two, which the tile must hold; 0 is a row.
    """
    split = hadamard_factors(n)
    if split is None or split[1] < 4 or capability >= (10, 0):
        return False
    spec = RowQuant(hadamard=n)
    return group <= padded(spec.left) * spec.right <= (16384 if capability >= (9, 0) else 8192)


def transform_matrices(spec: RowQuant, device: torch.device) -> tuple[Tensor, Tensor]:
    """H_left^T, padded with zeros, and H_right, with H_n = H_left (x) H_right; entries of +-1 in bfloat16.

    They are weights of the program: made at the first call, they would lie in the memory pool of a CUDA graph.
    """
    left = hadamard_matrix(spec.left).t()
    side = padded(spec.left)
    wide = torch.zeros(side, side, dtype=torch.bfloat16)
    wide[: spec.left, : spec.left] = left
    return wide.to(device), hadamard_matrix(spec.right).bfloat16().to(device)
