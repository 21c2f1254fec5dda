"""Blocks of GGUF, against the package that reads them."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.gguf_blocks import block_type, blocks_of
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor

EXACT = {
    "int8/group32/f16": "Q8_0", "int8/row/f16": "Q8_0", "int8/tensor/f16": "Q8_0", "int4/group32/f16": "Q4_0",
    "int4/group96/f16": "Q4_0", "int4/row/f16": "Q4_0", "int3/group32/f16": "Q4_0", "int2/row/f16": "Q4_0",
}  # fmt: skip
OFFSET = ["int4/group32/floatzero/f16", "int4/row/floatzero/f16", "int3/group64/floatzero/f16"]


def linear(text, seed, rows=6, columns=160, clip=False):
    form = Format.parse(text)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    parts = quantize_tensor(weight, form, clip=clip).stored_parts
    return QuantLinear(columns, rows, form, None, dict(zip(PARTS, parts, strict=True)))


def read(kind, blocks):
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))


@given(st.sampled_from(list(EXACT)), st.integers(0, 2**20), st.booleans())
def test_weights_are_read_bit_for_bit(text, seed, clip):
    module = linear(text, seed, clip=clip)
    kind, blocks = blocks_of("layer", module)
    assert kind == EXACT[text] and torch.equal(read(kind, blocks), module.weight)


@given(st.sampled_from(OFFSET), st.integers(0, 2**20), st.booleans())
def test_offsets_are_read_but_for_one_rounding(text, seed, clip):
    module = linear(text, seed, clip=clip)
    kind, blocks = blocks_of("layer", module)
    largest = float(module.scale.float().abs().max()) * 16
    assert kind == "Q4_1" and float((read(kind, blocks) - module.weight).abs().max()) <= 2**-22 * largest
    heads = blocks.view(6, -1, 20)[:, :, :4].contiguous().view(torch.float16)
    groups = heads[:, :1] if "row" in text else heads[:, :: module.format.group // 32]
    assert torch.equal(groups[..., 0], module.scale)
    assert torch.equal(groups[..., 1], (-module.scale.double() * module.zero.double()).half())


@pytest.mark.parametrize(
    "text, act, columns, words",
    [
        ("int4/group32/f16", "int8", 64, "activations in int8/row"),
        ("int4/group32", None, 64, "Fix: quantize to int4/group32/f16"),
        ("int4/group32/bf16", None, 64, "Fix: quantize to int4/group32/f16"),
        ("int4/group32/zero/f16", None, 64, "weights in int4/group32/zero/f16.*floatzero/f16"),
        ("int8/row/zero/f16", None, 64, "weights in int8/row/zero/f16"),
        ("int8/group32/floatzero/f16", None, 64, "weights in int8/group32/floatzero/f16"),
        ("fp8/row/f16", None, 64, "weights in fp8/row/f16"),
        ("int4/group128/zero/dual", None, 128, "weights in int4/group128/zero/dual"),
        ("int4/group48/f16", None, 96, "blocks that are not of 32 columns"),
        ("int4/group32/f16", None, 80, "blocks that are not of 32 columns .*K = 80"),
    ],
)
def test_what_no_type_holds(text, act, columns, words):
    with pytest.raises(ExportError, match=f"^layer: .*{words}"):
        block_type("layer", Format.parse(text), None if act is None else Format.parse(act), columns)


def test_a_zero_point_that_was_moved_afterwards_is_refused():
    module = linear("int4/group32/floatzero/f16", 3)
    module.zero = module.zero + 0.001
    with pytest.raises(ExportError, match="layer: scales that are no values of float16"):
        blocks_of("layer", module)


@given(st.integers(0, 2**20), st.sampled_from([None, False, True]))
def test_weights_of_q4_k_are_read_bit_for_bit(seed, clip):
    """Quantized, to nearest and searched, and of parts that use every bit of the six."""
    module = linear("int4/group32/k6", seed, columns=512, clip=bool(clip))
    if clip is None:
        generator = torch.Generator().manual_seed(seed)
        module.codes = torch.randint(0, 256, module.codes.shape, generator=generator).to(torch.uint8)
        module.zero = torch.randint(0, 64, module.zero.shape, generator=generator).to(torch.uint8)
        module.group_scale = torch.randint(1, 64, module.zero.shape, generator=generator).to(torch.int8)
    kind, blocks = blocks_of("layer", module)
    assert (kind, blocks.shape) == ("Q4_K", (6, 2 * 144))
    assert torch.equal(read(kind, blocks), module.weight)


def test_q4_k_has_whole_blocks():
    form = Format.parse("int4/group32/k6")
    assert block_type("layer", form, None, 1536) == "Q4_K"
    with pytest.raises(ExportError, match="^layer: 576 columns, which are no whole blocks of 256.*floatzero/f16"):
        block_type("layer", form, None, 576)
    with pytest.raises(ExportError, match="activations in int8/row.*or use a preset gguf-"):
        block_type("layer", form, Format("int8"), 1536)
