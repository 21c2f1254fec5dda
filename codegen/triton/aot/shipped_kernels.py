"""The kernels that are compiled ahead of time, for every architecture, wherever the code changes.

One of each kind that launch/ runs: formats, regimes of M, epilogues. What they may cost is in budget.json, so that a
change of the generated code shows in a review.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qcompile.codegen.triton.kernels.attention_spec import KVDecode, KVMerge, KVRead, KVWrite
from qcompile.codegen.triton.kernels.experts_spec import (
    GemmExperts,
    GemmExpertsA8,
    GemmExpertsW4A8,
    QuantizedExperts,
    SumExperts,
)
from qcompile.codegen.triton.kernels.group_spec import GemmFp4Fp8, GemmGroup
from qcompile.codegen.triton.kernels.kernel_support import has_format
from qcompile.codegen.triton.kernels.spec import (
    Dequant,
    Gemm8,
    GemmCodes,
    GemmW,
    KernelSpec,
    Pack,
    RowQuant,
    SumK,
    WeightFields,
)
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes, RoundGradient, RoundValues
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8
from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.codegen.triton.launch.kv_attention import DECODE, MERGE, READ, write_launch
from qcompile.codegen.triton.launch.pack_weights import pairs_scales, zero_points_of
from qcompile.codegen.triton.launch.round_codes import change_launch
from qcompile.codegen.triton.launch.row_quant import fuses_hadamard, num_warps
from qcompile.codegen.triton.launch.tiles import M_REGIMES, Launch, launch_of, place_scales
from qcompile.numerics.format import Format

FORMATS = ("int4/group128", "int4/group128/zero", "int4/group64/floatzero", "int4/group32/zero", "int4/row",
           "int8/row", "int3/group128/zero", "int2/group64/zero")  # fmt: skip
GEMM_CODES: tuple[GemmCodes, ...] = ("int8", "fp8")


@dataclass(frozen=True)
class ShippedKernel:
    """A kernel and how it is run; its text is its key in budget.json.

    Attributes:
        spec: what it computes.
        launch: its sizes.
        columns: K of a row (row_quant only).
        experts: of a stack (gemm_experts only).
    """

    spec: KernelSpec
    launch: Launch
    columns: int = 0
    experts: int = 0

    def __str__(self) -> str:
        launch = self.launch
        size = f"K={self.columns}" if self.columns else f"{launch.block_m}x{launch.block_n}"
        size += f" {self.experts} experts" if self.experts else ""
        return f"{self.spec} {size} {launch.num_warps} warps {launch.num_stages} stages"

    @property
    def constants(self) -> dict[str, int]:
        """Constexpr arguments that are not in the launch."""
        if self.experts:
            return {"EXPERTS": 1 << self.experts.bit_length()}
        return {"BLOCK": 1 << (self.columns - 1).bit_length()} if self.columns else {}


def shipped(architecture: int) -> Iterator[ShippedKernel]:
    """All for sm_`architecture`, each once."""
    yield from dict.fromkeys(_all(architecture))


def _all(architecture: int) -> Iterator[ShippedKernel]:
    capability = architecture // 10, architecture % 10
    for text in FORMATS:
        yield from _weight_only(Format.parse(text), capability)
    for spec in (
        GemmW("fp16"),
        GemmW("bf16", zero="int", paired=True, parts=True),
        GemmW("bf16", zero="int", paired=True, bias=True, residual=True, low_rank=32),
        GemmW("bf16", zero="int", paired=True, ragged=True),
    ):
        yield ShippedKernel(spec, launch_of(spec, 16, capability))
    for codes in GEMM_CODES:
        if has_format(codes, capability):
            yield from _quantized_activations(codes, capability)
    yield from _w4a8(capability)
    yield from _experts(capability)
    yield from _quantized_experts(capability)
    yield from _groups(capability)
    if has_format("fp8", capability):
        yield from _fp4_by_fp8(capability)
    yield from _cached_attention()
    yield ShippedKernel(SumK("bf16", bias=True, residual=True), launch_of(SumK()))
    yield from _int4_rows(capability)
    for rounding in (RoundGradient(stochastic=True), RoundGradient(), RoundValues()):
        yield ShippedKernel(rounding, launch_of(rounding))
    for decay in (False, True):
        for stochastic in (True, False):
            change = ChangeCodes(decay=decay, stochastic=stochastic)
            yield ShippedKernel(change, change_launch(change))


def _weight_only(form: Format, capability: tuple[int, int]) -> Iterator[ShippedKernel]:
    layout = layout_of(form)
    assert layout is not None
    fields = WeightFields(
        bits=layout.bits, group=layout.group, zero=zero_points_of(form, torch.bfloat16), chunk=layout.chunk,
        paired=pairs_scales(form, torch.bfloat16), ragged=False,
    )  # fmt: skip
    for m in M_REGIMES:
        gemm = place_scales(GemmW("bf16", **fields), m, capability)
        yield ShippedKernel(gemm, launch_of(gemm, m, capability))
    for spec in (
        Dequant("bf16", **fields),
        Pack(bits=layout.bits, group=0, chunk=layout.chunk, signed=layout.bits == 8),
    ):
        yield ShippedKernel(spec, launch_of(spec))


def _w4a8(capability: tuple[int, int]) -> Iterator[ShippedKernel]:
    per_group, per_channel = GemmW4A8(), GemmW4A8(group=0)
    for m in M_REGIMES:
        for spec in (per_group, per_channel):
            yield ShippedKernel(spec, launch_of(spec, m, capability))
    yield ShippedKernel(GemmW4A8(bias=True, residual=True), launch_of(per_group, 128, capability))
    for spec in (
        GemmW4A8(group=32, chunk=32),
        GemmW4A8(group=64),
        GemmW4A8(parts=True),
        GemmW4A8(ragged=True),
        GemmW4A8(bias=True, residual=True, low_rank=32),
    ):
        yield ShippedKernel(spec, launch_of(spec, 16, capability))
    pack = Pack(group=0, chunk=64, bytewise=True)
    yield ShippedKernel(pack, launch_of(pack))


def _experts(capability: tuple[int, int]) -> Iterator[ShippedKernel]:
    fields = WeightFields(bits=4, group=128, zero="int", chunk=32, paired=True, ragged=False)
    of_rows = WeightFields(bits=8, group=0, zero="none", chunk=64, paired=False, ragged=False)
    for m in M_REGIMES:
        for gather in (True, False):
            spec = place_scales(GemmExperts("bf16", **fields, gather=gather), m, capability)
            yield ShippedKernel(spec, launch_of(spec, m, capability), experts=8)
    for spec in (
        GemmExperts("bf16", **of_rows, gather=True),
        GemmExperts("bf16", **fields | {"ragged": True}),
        GemmExperts("fp16", group=32, zero="int", gather=True),
        GemmExperts("bf16", **fields, parts=True, gather=True),
    ):
        yield ShippedKernel(spec, launch_of(spec, 16, capability), experts=8)
    many = GemmExperts("bf16", **fields, gather=True)
    yield ShippedKernel(many, launch_of(many, 16, capability), experts=128)


def _quantized_experts(capability: tuple[int, int]) -> Iterator[ShippedKernel]:
    codes = [each for each in GEMM_CODES if has_format(each, capability)]
    gathered: list[QuantizedExperts] = [
        *(GemmExpertsA8("bf16", each, gather=True) for each in codes),
        GemmExpertsW4A8(gather=True),
    ]
    for m in M_REGIMES:
        for spec in gathered:
            yield ShippedKernel(spec, launch_of(spec, m, capability), experts=8)
    for spec in (
        *(GemmExpertsA8("bf16", each) for each in codes),
        GemmExpertsW4A8(),
        GemmExpertsA8(ragged=True, gather=True),
        GemmExpertsW4A8(group=0, gather=True),
        GemmExpertsW4A8(group=32, chunk=32, ragged=True, gather=True),
        *(dataclasses.replace(spec, parts=True) for spec in gathered),
    ):
        yield ShippedKernel(spec, launch_of(spec, 16, capability), experts=8)
    for sums in (SumExperts("bf16", each, gather=True) for each in codes):
        yield ShippedKernel(sums, launch_of(sums), experts=8)
    for spec in (GemmExpertsA8(gather=True), GemmExpertsW4A8(gather=True)):
        yield ShippedKernel(spec, launch_of(spec, 16, capability), experts=128)


def _groups(capability: tuple[int, int]) -> Iterator[ShippedKernel]:
    for m in M_REGIMES:
        for spec in (GemmGroup(), GemmGroup(zero=True), GemmGroup(zero=True, act="group")):
            yield ShippedKernel(spec, launch_of(spec, m, capability))
    for spec in (
        GemmGroup(zero=True, bias=True, residual=True, low_rank=32),
        GemmGroup(zero=True, act="group", residual=True),
    ):
        yield ShippedKernel(spec, launch_of(spec, 128, capability))
    for spec in (
        GemmGroup(zero=True, act="group", parts=True),
        GemmGroup(group=64, zero=True, act="group"),
        GemmGroup(group=32, chunk=32, zero=True, act="group", ragged=True),
        GemmGroup(group=32, chunk=32),
        GemmGroup(ragged=True),
    ):
        yield ShippedKernel(spec, launch_of(spec, 32, capability))


def _fp4_by_fp8(capability: tuple[int, int]) -> Iterator[ShippedKernel]:
    for m in M_REGIMES:
        yield ShippedKernel(GemmFp4Fp8(), launch_of(GemmFp4Fp8(), m, capability))
    for spec in (
        GemmFp4Fp8(parts=True),
        GemmFp4Fp8(ragged=True),
        GemmFp4Fp8(group=32, chunk=32),
        GemmFp4Fp8(act="group"),
        GemmFp4Fp8(bias=True, residual=True, low_rank=32),
    ):
        yield ShippedKernel(spec, launch_of(spec, 32, capability))
    correction = GemmFp4Fp8(residual=True, low_rank=8)
    yield ShippedKernel(correction, launch_of(correction, 128, capability))


def _int4_rows(capability: tuple[int, int]) -> Iterator[ShippedKernel]:
    for quantize, columns in (
        (RowQuant("bf16", codes="int4"), 4096),
        (RowQuant("bf16", first="rms", group=128, codes="int4"), 4096),
        (RowQuant("bf16", first="rms", group=128, codes="int4", zero=True), 4096),
        (RowQuant("bf16", first="rms", hadamard=4096, group=128, codes="int4"), 4096),
        (RowQuant("bf16", first="gate", hadamard=14336, group=128, codes="int4"), 14336),
        (RowQuant("bf16", first="gate", hadamard=14336, group=128, codes="int4", zero=True), 14336),
    ):
        if not quantize.hadamard or fuses_hadamard(quantize.hadamard, capability, quantize.group):
            yield ShippedKernel(quantize, Launch(1, 1, num_warps(quantize, columns), 1), columns)


def _cached_attention() -> Iterator[ShippedKernel]:
    for decode in (
        KVDecode(heads=4),
        KVDecode(heads=8),
        KVDecode(heads=4, width=64),
        KVDecode(heads=4, width=256),
        KVDecode(bits=8, heads=4),
        KVDecode(heads=4, queries=2),
        KVDecode(heads=4, masked=True),
        KVDecode(heads=4, window=True, cap=True),
    ):
        yield ShippedKernel(decode, DECODE)
    for write in (KVWrite(), KVWrite(bits=8), KVWrite("fp32", width=256)):
        for spec in (write, dataclasses.replace(write, many=True)):
            yield ShippedKernel(spec, write_launch(spec))
    yield ShippedKernel(KVMerge(), MERGE)
    for read in (KVRead(), KVRead(bits=8, width=256)):
        yield ShippedKernel(read, READ)


def _quantized_activations(codes: GemmCodes, capability: tuple[int, int]) -> Iterator[ShippedKernel]:
    for m in M_REGIMES:
        yield ShippedKernel(Gemm8("bf16", codes), launch_of(Gemm8(), m, capability))
    for spec in (Gemm8("bf16", codes, parts=True), Gemm8("bf16", codes, bias=True, residual=True, low_rank=32)):
        yield ShippedKernel(spec, launch_of(Gemm8(), 16, capability))
    for sums in (SumK("bf16", codes), SumK("bf16", codes, low_rank=32)):
        yield ShippedKernel(sums, launch_of(sums))
    for quantize, columns in (
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
        if not quantize.hadamard or fuses_hadamard(quantize.hadamard, capability):
            yield ShippedKernel(quantize, Launch(1, 1, num_warps(quantize, columns), 1), columns)
