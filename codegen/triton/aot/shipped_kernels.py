"""The kernels that are compiled ahead of time, for every architecture, wherever the code changes.

One of each kind that `tiles.py` runs: formats, regimes, epilogues. What they may cost is in budget.json, so that a
change of the generated code shows in a review.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qcompile.codegen.triton.kernels.spec import Dequant, Gemm8, GemmW, GemvW, KernelSpec, Pack, RowQuant, SumK
from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.codegen.triton.launch.row_quant import fuses_hadamard, warps
from qcompile.codegen.triton.launch.tiles import ROWS, Launch, launch_of, scaled
from qcompile.numerics.format import Format

FORMS = ("int4/group128", "int4/group128/zero", "int4/group64/floatzero", "int4/group32/zero", "int4/row", "int8/row",
         "int3/group128/zero", "int2/group64/zero")  # fmt: skip


@dataclass(frozen=True)
class Shipped:
    """A kernel and how it is run, `columns` being those of a row (row_quant)."""

    spec: KernelSpec
    launch: Launch
    columns: int = 0

    def __str__(self) -> str:
        how = self.launch
        size = f"K={self.columns}" if self.columns else f"{how.rows}x{how.channels}"
        return f"{self.spec} {size} {how.warps} warps {how.stages} stages"

    @property
    def constants(self) -> dict[str, int]:
        """Sizes that are not in the launch."""
        return {"BLOCK": 1 << (self.columns - 1).bit_length()} if self.columns else {}


def shipped(architecture: int) -> Iterator[Shipped]:
    """All for sm_`architecture`, each once."""
    yield from dict.fromkeys(_all(architecture))


def _all(architecture: int) -> Iterator[Shipped]:
    capability = architecture // 10, architecture % 10
    for text in FORMS:
        layout = layout_of(Format.parse(text))
        assert layout is not None
        form = Format.parse(text)
        fields = dict(bits=layout.bits, group=layout.group, zero=form.zero, chunk=layout.chunk)
        for rows in ROWS:
            spec = scaled(GemmW("bf16", **fields), rows)
            yield Shipped(spec, launch_of(spec, rows, capability))
        few = GemvW("bf16", **fields)
        yield Shipped(few, launch_of(few))
        whole = Dequant("bf16", **fields)
        yield Shipped(whole, launch_of(whole))
        stored = Pack(bits=layout.bits, group=0, chunk=layout.chunk, signed=layout.bits == 8)
        yield Shipped(stored, launch_of(stored))
    for spec in (
        GemmW("fp16"),
        GemmW("bf16", parts=True),
        GemmW("bf16", bias=True, residual=True, low_rank=32),
        GemmW("bf16", ragged=True),
    ):
        yield Shipped(spec, launch_of(spec, 16, capability))
    for rows in range(2, 5):
        yield Shipped(GemvW("bf16", rows=rows), launch_of(GemvW()))
    for codes in ("int8", "fp8") if capability >= (8, 9) else ("int8",):
        for rows in ROWS:
            yield Shipped(Gemm8("bf16", codes), launch_of(Gemm8(), rows, capability))
        yield Shipped(Gemm8("bf16", codes, parts=True), launch_of(Gemm8(), 16, capability))
        yield Shipped(Gemm8("bf16", codes, bias=True, residual=True, low_rank=32), launch_of(Gemm8(), 16, capability))
        yield Shipped(SumK("bf16", codes), launch_of(SumK()))
        yield from _rows(codes, capability)
    yield Shipped(SumK("bf16", bias=True, residual=True), launch_of(SumK()))
    int4 = RowQuant("bf16", first="rms", group=128, codes="int4")
    yield Shipped(int4, Launch(1, 1, warps(int4, 4096), 1), 4096)


def _rows(codes: str, capability: tuple[int, int]) -> Iterator[Shipped]:
    for spec, columns in (
        (RowQuant("bf16", codes=codes), 4096),
        (RowQuant("bf16", first="rms", codes=codes), 4096),
        (RowQuant("bf16", first="rms", residual=True, codes=codes), 8192),
        (RowQuant("bf16", first="rms", residual=True, value=True, codes=codes), 4096),
        (RowQuant("bf16", first="layer", codes=codes), 4096),
        (RowQuant("bf16", first="layer", value=True, codes=codes), 4096),
        (RowQuant("bf16", first="gate", value=True, smooth=True, codes=codes), 14336),
        (RowQuant("bf16", first="gate", codes=codes), 14336),
        (RowQuant("bf16", first="rms", group=128, codes=codes), 4096),
        (RowQuant("bf16", first="rms", hadamard=4096, codes=codes), 4096),
        (RowQuant("bf16", first="gate", hadamard=14336, codes=codes), 14336),
    ):
        if not spec.hadamard or fuses_hadamard(spec.hadamard, capability):
            yield Shipped(spec, Launch(1, 1, warps(spec, columns), 1), columns)
