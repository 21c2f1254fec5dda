"""What a kernel computes: frozen, typed, and written as one word that reads back.

    gemm_w     x [M, K] float  @  W [N, K] integer codes      weight-only, on tensor cores
    gemm_a8    x [M, K] int8 or fp8  @  W [N, K] the same     per-token scales of x, per-channel scales of W
    row_quant  [residual +] norm or gate or nothing, [/ smoothing], [Hadamard]  ->  codes and scales of each row
    sum_k      the partial sums of a split-K GEMM, in order, with its epilogue
    dequant    W [N, K] codes -> dequantized values, for a GEMM by cuBLAS
    pack       W [N, K] codes as a checkpoint stores them -> as the kernels read them

Those that round in training stand in training_spec.py.

A spec says what is computed, not how large the tiles are: that is a Launch (tiles.py). Everything a kernel does not
need is absent from its source. Names and values of the fields are the text of a spec, which budget.json, tuning caches
and `qcompile kernels show` know a kernel by.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict

from qcompile.numerics.hadamard import hadamard_factors

Dtype = Literal["bf16", "fp16", "fp32"]
Zero = Literal["none", "int", "float"]
GemmCodes = Literal["int8", "fp8"]
ActScales = Literal["row", "tensor"]


class WeightFields(TypedDict):
    """Fields that all specs of kernels with a weight of integer codes have, see _Weight."""

    bits: int
    group: int
    zero: Zero
    chunk: int
    paired: bool
    ragged: bool


@dataclass(frozen=True)
class KernelSpec:
    """What all kernels have.

    Attributes:
        dtype: of the values that come in and go out.
        dtypes: those that the kernel is written for.
        exact: whether every bit of the result is defined, by a definition in PyTorch: the compiler may then not fuse a
            product and a sum into one rounding, and integers wrap around.
    """

    template: ClassVar[str]
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16", "fp16")
    exact: ClassVar[bool] = False
    dtype: Dtype = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in self.dtypes:
            raise ValueError(f"{self}: dtype {self.dtype}; there is {self.template} for {', '.join(self.dtypes)}")

    def __str__(self) -> str:
        words = [self.template, self.dtype]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(field.name if value is True else f"{field.name}={value}")
        return "/".join(words)


@dataclass(frozen=True)
class _Weight(KernelSpec):
    """Integer codes of a weight [N, K], packed as in weight_layout.py.

    Attributes:
        bits: 2, 3, 4 or 8.
        group: columns that share a scale; 0 is a per-channel scale.
        zero: none (the middle code is zero), int, or float (HQQ, QA-LoRA).
        chunk: columns that one shift of the packed words gives.
        paired: the scale and the zero point of a group are one 32-bit word (weight_layout.join_scales).
        ragged: whether K is no multiple of a block of packed columns.
    """

    bits: int = 4
    group: int = 128
    zero: Zero = "none"
    chunk: int = 32
    paired: bool = False
    ragged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"{self}: bits {self.bits}; there are kernels for 2, 3, 4 and 8")
        if self.chunk < 16 or self.chunk & (self.chunk - 1):
            raise ValueError(f"{self}: chunk {self.chunk}; a power of two of at least 16")
        if self.group % self.chunk:
            raise ValueError(f"{self}: a chunk of {self.chunk} columns crosses groups of {self.group}")
        if self.paired and not (self.dtype == "bf16" and self.group and self.zero == "int" and self.bits <= 4):
            raise ValueError(f"{self}: scale and zero point are paired for bf16, in groups, with zero=int, to 4 bits")

    @property
    def word(self) -> int:
        """Bits of a packed word."""
        return 16 if self.bits == 4 else 8

    @property
    def chunks(self) -> int:
        """Chunks in a block: codes in a word (for three bits, in a byte of its plane of single bits)."""
        return 8 if self.bits == 3 else self.word // self.bits

    @property
    def block(self) -> int:
        """Columns that are packed together."""
        return self.chunk * self.chunks

    @property
    def scales(self) -> int:
        """Scales in a block: one if its chunks share it."""
        return self.block // self.group if 0 < self.group < self.block else 1


@dataclass(frozen=True)
class GemmW(_Weight):
    """out = x W^T [+ low up^T] [+ bias] [+ residual].

    Attributes:
        scaled: "weights" multiplies each weight by its scale before the dot product, "sums" the float32 sums of a
            group after it: one multiplication for an output instead of one for a weight, and no rounding.
        parts: split-K: partial sums of ranges of K, added by sum_k in order: always the same bits.
        low_rank: adds low [M, R] @ up [N, R]^T (ZeroQuant-V2's LoRC), R this value; 0 without. With split-K, the first
            part has it; a bias and a residual are sum_k's.
    """

    template: ClassVar[str] = "gemm_w"
    scaled: Literal["weights", "sums"] = "sums"
    parts: bool = False
    bias: bool = False
    residual: bool = False
    low_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts and (self.bias or self.residual):
            raise ValueError(f"{self}: with split-K (parts), sum_k adds the bias and the residual")


@dataclass(frozen=True)
class Gemm8(KernelSpec):
    """out = (x W^T) x_scale w_scale [+ low up^T] [+ bias] [+ residual]; sums in int32, or float32 for fp8.

    Attributes:
        codes: int8 or fp8 (e4m3) of both sides.
        act: granularity of x_scale: per token ("row") or per tensor ("tensor").
        ragged: whether K is no multiple of block_k (128).
        parts: split-K, as in GemmW.
        bias: as in GemmW.
        residual: as in GemmW.
        low_rank: as in GemmW; with split-K it is sum_k's, as the partial sums are integers or lack their scales.
    """

    template: ClassVar[str] = "gemm_a8"
    codes: GemmCodes = "int8"
    act: ActScales = "row"
    ragged: bool = False
    parts: bool = False
    bias: bool = False
    residual: bool = False
    low_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts and (self.bias or self.residual or self.low_rank):
            raise ValueError(
                f"{self}: with split-K (parts) the partial sums have no scales yet: "
                "sum_k adds bias, residual and low_rank"
            )


@dataclass(frozen=True)
class SumK(KernelSpec):
    """out = partial sums of a split-K GEMM, in order, [times the scales of gemm_a8] [+ low up^T] [+ bias] [+ residual].

    Attributes:
        codes: of the GEMM: "" for gemm_w, int8 (its sums are int32) or fp8.
        act: as in Gemm8.
        bias: as in GemmW.
        residual: as in GemmW.
        low_rank: as in GemmW, of GEMMs whose parts have no scales yet.
    """

    template: ClassVar[str] = "sum_k"
    codes: Literal["", "int8", "fp8"] = ""
    act: ActScales = "row"
    bias: bool = False
    residual: bool = False
    low_rank: int = 0


@dataclass(frozen=True)
class RowQuant(KernelSpec):
    """Codes and scales of the rows of x [M, K], read once and written once.

    Attributes:
        first: rms, layer (with a shift), gate (silu(x) * gate), or none.
        residual: x + residual is the input of `first`, and is written too.
        value: the result of norm or gate is written too, for other consumers; the codes are the same without.
        smooth: divide by smooth [K].
        hadamard: K of an online Hadamard transform, 0 without.
        codes: int8, fp8 (e4m3) or int4, a byte each.
        group: columns that share a scale, a power of two; 0 is a per-token scale.
        zero: int4 codes with integer zero points, which are written less those: -15 .. 15.
    """

    template: ClassVar[str] = "row_quant"
    first: Literal["none", "rms", "layer", "gate"] = "none"
    residual: bool = False
    value: bool = False
    smooth: bool = False
    hadamard: int = 0
    codes: Literal["int8", "fp8", "int4"] = "int8"
    group: int = 0
    zero: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hadamard and (hadamard_factors(self.hadamard) is None or self.right < 16):
            raise ValueError(f"{self}: a Hadamard transform of a size k 2^m with m of at least 4")
        if self.zero and self.codes != "int4":
            raise ValueError(f"{self}: {self.codes} codes with zero points; less those, int4 codes fit a byte")
        if self.group & (self.group - 1):
            raise ValueError(f"{self}: groups of {self.group}; a power of two")
        if self.value and self.first == "none":
            raise ValueError(f"{self}: without a norm or a gate the value is x, which is there")

    @property
    def right(self) -> int:
        """Of n = left right: the transform is H_left X H_right with X [left, right], as small matmuls."""
        k, m = hadamard_factors(self.hadamard) or (1, 0)
        return int(2 ** max(min(m, 4), min(m, (m + k.bit_length()) // 2)))

    @property
    def left(self) -> int:
        """The other factor; its matmul takes it padded to a power of two of at least 16."""
        return self.hadamard // self.right

    @property
    def flat(self) -> bool:
        """Whether a row is one vector; else it is [groups, group] or [left, right]."""
        return not self.group and not self.hadamard


@dataclass(frozen=True)
class Dequant(_Weight):
    """The dequantized values of W, [N, K]."""

    template: ClassVar[str] = "dequant"


@dataclass(frozen=True)
class Pack(_Weight):
    """Stored codes of W [N, K] packed as in weight_layout.py; scales and zero points stay as they are.

    Attributes:
        signed: 8-bit codes are signed, and get 128 more. Below 8 bits they are stored unsigned, as a stream of bits.
        bytewise: 4-bit codes in words of 8 bits, for products of bytes.
    """

    template: ClassVar[str] = "pack"
    signed: bool = False
    bytewise: bool = False

    @property
    def word(self) -> int:
        """Bits of a packed word."""
        return 8 if self.bytewise else super().word

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signed and self.bits != 8:
            raise ValueError(f"{self}: codes of {self.bits} bits are stored unsigned")
