"""What a format demands of stored tensors: what quantizing gives passes, and every value out of range is refused."""

from __future__ import annotations

import pytest
import torch

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.stored_checks import check_no_nan, check_signs, check_stored, require
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor

FORMATS = [
    "int8", "int8/tensor", "int8/row/zero", "int8/group16", "int4/group16/zero", "int4/group16",
    "int4/group16/floatzero", "int3/group16/zero", "int2/group16/zero", "int4/group16/zero/dual", "int4/group16/dual",
    "fp8", "fp4/group16", "fp4/group16/m1", "fp4/group16/m2", "int4/group128/zero",
    "int4/group16/f16", "int4/group16/floatzero/bf16", "int8/tensor/bf16", "fp8/row/f16",
]  # fmt: skip


def stored(text, columns=40, clip=False):
    torch.manual_seed(0)
    form = Format.parse(text)
    weight = torch.randn(12, columns)
    weight[3] *= 100
    weight[5] = 0
    parts = zip(PARTS, quantize_tensor(weight, form, clip=clip).stored_parts, strict=True)
    return form, {name: part.clone() for name, part in parts if part is not None}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("columns", [40, 37])
@pytest.mark.parametrize("text", FORMATS)
def test_what_quantizing_gives_passes(text, columns, clip):
    form, parts = stored(text, columns, clip)
    check_stored("site", parts, form, (12,), columns)
    if form.per != "tensor":
        stack = {name: part.unflatten(0, (2, 6)) for name, part in parts.items()}
        check_stored("site", stack, form, (2, 6), columns)


@pytest.mark.parametrize("text", FORMATS)
def test_missing_and_misshapen_parts_are_named(text):
    form, parts = stored(text)
    for name in parts:
        with pytest.raises(CheckpointError, match="'site' has .* is stored as"):
            check_stored("site", {n: p for n, p in parts.items() if n != name}, form, (12,), 40)
        with pytest.raises(CheckpointError, match=f"site.{name}' is .*, but must be"):
            check_stored("site", {**parts, name: parts[name].unsqueeze(0)}, form, (12,), 40)
        with pytest.raises(CheckpointError, match=f"site.{name}' is int64"):
            check_stored("site", {**parts, name: parts[name].long()}, form, (12,), 40)


def changed(text, part, value, at=-1):
    form, parts = stored(text, 37)
    parts[part].view(-1)[at] = value
    with pytest.raises(CheckpointError, match=f"site.{part}' (holds|has|times) .*Fix: ") as caught:
        check_stored("site", parts, form, (12,), 37)
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize(
    "text", ["int8", "int8/tensor", "fp8", "int4/group16/zero", "int4/group16/dual", "fp4/group16/m2"]
)
def test_scales_are_finite_and_positive(text, value):
    assert "finite and positive" in changed(text, "scale", value)


def test_a_negative_scale_is_legal_where_the_clip_search_makes_one():
    form, parts = stored("int4/group16")
    parts["scale"].neg_()
    check_stored("site", parts, form, (12,), 40)
    for value in (float("nan"), 0.0, float("-inf")):
        changed("int4/group16", "scale", value)


def test_zero_points_are_in_range():
    assert "the zero point 16: codes end at 15" in changed("int4/group16/zero", "zero", 16)
    assert "the zero point 8: codes end at 7" in changed("int3/group16/zero", "zero", 8)
    assert "not finite" in changed("int4/group16/floatzero", "zero", float("inf"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("int4/group16/zero/dual", 0), ("int4/group16/zero/dual", -1), ("int4/group16/dual", 0), ("int4/group16/dual", 16),
     ("int4/group16/dual", -16), ("fp4/group16/m1", 1), ("fp4/group16/m2", -9)],
)  # fmt: skip
def test_group_scales_are_in_range(text, value):
    assert f"holds {value}: group scales of {text}" in changed(text, "group_scale", value)


def test_products_of_two_levels_are_int8():
    assert "leave int8" in str(changed_products())


def changed_products():
    form, parts = stored("int4/group16/zero/dual")
    parts["group_scale"][0, 0], parts["zero"][0, 0], parts["codes"][0, 0] = 16, 0, 0xFF
    with pytest.raises(CheckpointError, match="site.codes' times their group scales") as caught:
        check_stored("site", parts, form, (12,), 40)
    return caught.value


@pytest.mark.parametrize("text", ["int4/group16/zero", "int3/group16/zero", "fp4/group16", "int2/group16/zero"])
def test_bits_behind_the_last_code_are_refused(text):
    assert "bits behind the 37 codes" in changed(text, "codes", 0xFF)


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_nan_is_no_code_of_fp8(bits):
    form, parts = stored("fp8")
    parts["codes"].view(torch.uint8)[2, 3] = bits
    with pytest.raises(CheckpointError, match="site.codes' holds NaN"):
        check_stored("site", parts, form, (12,), 40)


def test_signs_are_signs_of_a_size_that_has_a_transform():
    check_signs("signs", torch.tensor([1.0, -1, 1, 1]), 4)
    for signs, size in (
        (torch.tensor([1.0, 0, 1, 1]), 4),
        (torch.ones(3), 4),
        (torch.ones(3), 3),
        (torch.ones(4).int(), 4),
    ):
        with pytest.raises(CheckpointError, match="'signs'"):
            check_signs("signs", signs, size)


def test_floats_without_nan():
    check_no_nan("x", torch.tensor([1.0, float("inf")]))
    check_no_nan("x", torch.tensor([1]))
    with pytest.raises(CheckpointError, match="'x' holds NaN"):
        check_no_nan("x", torch.tensor([float("nan")]))
    with pytest.raises(CheckpointError, match=r"'x' is float32 \[2\], but must be int8 or uint8 \[3\]"):
        require("x", torch.ones(2), ((3,), (torch.int8, torch.uint8)))


def test_scales_have_the_dtype_of_the_format():
    form, parts = stored("int4/group16/f16")
    assert parts["scale"].dtype == torch.float16
    with pytest.raises(CheckpointError, match="'site.scale' is float32 .*, but must be float16"):
        check_stored("site", {**parts, "scale": parts["scale"].float()}, form, (12,), 40)
    form, parts = stored("int4/group16")
    with pytest.raises(CheckpointError, match="'site.scale' is bfloat16 .*, but must be float32"):
        check_stored("site", {**parts, "scale": parts["scale"].bfloat16()}, form, (12,), 40)


def k6_parts():
    form = Format.parse("int4/group32/k6")
    return form, dict(zip(PARTS, quantize_tensor(torch.randn(4, 512), form).stored_parts, strict=True))


def test_k6_passes_and_is_checked_part_by_part():
    form, parts = k6_parts()
    check_stored("site", parts, form, (4,), 512)
    check_stored("site", {name: part.unflatten(0, (2, 2)) for name, part in parts.items()}, form, (2, 2), 512)
    for name, at, value, words in (
        ("scale", 0, 0.0, "finite and positive"),
        ("scale", 2, float("nan"), "finite and positive"),
        ("scale", 1, -1.0, "scales of offsets that are not finite, or negative"),
        ("scale", 3, float("inf"), "scales of offsets"),
        ("group_scale", 0, 0, "not 1 to 63"),
        ("group_scale", 5, 64, "not 1 to 63"),
        ("zero", 5, 64, "not 0 to 63"),
    ):
        form, parts = k6_parts()
        parts[name].view(-1)[at] = value
        with pytest.raises(CheckpointError, match=f"site.{name}' holds .*{words}"):
            check_stored("site", parts, form, (4,), 512)
    form, parts = k6_parts()
    parts["scale"][0, 1] = 0  # no offsets in a block
    check_stored("site", parts, form, (4,), 512)
