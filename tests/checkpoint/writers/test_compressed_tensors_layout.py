"""compressed-tensors: what tensors and config.json say of each format, and what cannot be said."""

from __future__ import annotations

import pytest
import torch
from served_models import quantized

from qcompile.checkpoint.writers.compressed_tensors_layout import compressed_layout, quantization_config, scheme_of
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.numerics.format import Format


def scheme(weight, act=None, columns=256, dtype=torch.float32):
    return scheme_of("layer", Format.parse(weight), None if act is None else Format.parse(act), columns, dtype)


@pytest.mark.parametrize(
    "weight, act, kind, weights, activations",
    [
        ("int4/group128", None, "pack-quantized", (4, "int", True, "group", 128), None),
        ("int4/group128/zero", None, "pack-quantized", (4, "int", False, "group", 128), None),
        ("int4/group512", None, "pack-quantized", (4, "int", True, "group", 256), None),
        ("int8/row", None, "pack-quantized", (8, "int", True, "channel", None), None),
        ("int4/row", "int8/row", "pack-quantized", (4, "int", True, "channel", None), (8, "int", True)),
        ("int4/group128", "fp8/row", "pack-quantized", (4, "int", True, "group", 128), (8, "float", True)),
        ("int8/row", "int8/row", "int-quantized", (8, "int", True, "channel", None), (8, "int", True)),
        ("int8/tensor", "int8/row/zero", "int-quantized", (8, "int", True, "tensor", None), (8, "int", False)),
        ("fp8/row", "fp8/row", "float-quantized", (8, "float", True, "channel", None), (8, "float", True)),
        ("fp8/tensor", None, "float-quantized", (8, "float", True, "tensor", None), None),
    ],
)
def test_schemes(weight, act, kind, weights, activations):
    found = scheme(weight, act)
    assert found["format"] == kind and found["output_activations"] is None
    arguments = found["weights"]
    assert tuple(arguments.get(k) for k in ("num_bits", "type", "symmetric", "strategy", "group_size")) == weights
    assert arguments["dynamic"] is False
    if activations is None:
        assert found["input_activations"] is None
    else:
        want = dict(zip(("num_bits", "type", "symmetric"), activations, strict=True))
        assert found["input_activations"] == {**want, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    "weight, act, words",
    [
        ("int4/group96", None, r"a last group of 64 of 96 columns \(K = 256\).*use groups of 128"),
        ("int4/group128/floatzero", None, "zero points that are no integers"),
        ("int4/group128/zero/dual", "int8/row", "integer group scales under a float scale"),
        ("fp4/group128/m2", None, "neither MXFP4 nor NVFP4"),
        ("fp4/row", None, "neither MXFP4 nor NVFP4"),
        ("int4/tensor", None, "one scale for a packed weight"),
        ("int8/row/zero", "int8/row", "int8/row/zero weights with int8/row activations"),
        ("int8/group128", "int8/row", "int8/group128 weights with int8/row activations"),
        ("int8/row", "int4/row", "int8/row weights with int4/row activations"),
        ("fp8/row", "int8/row", "fp8/row weights with int8/row activations"),
        ("fp8/group128", "fp8/row", "fp8/group128 weights"),
        ("int8/row", "int8/tensor", "activations in int8/tensor.*one scale for a token"),
        ("int4/row", "int4/group128/smooth", "activations in int4/group128/smooth"),
    ],
)
def test_what_cannot_be_said_is_refused_with_a_fix(weight, act, words):
    with pytest.raises(ExportError, match=f"^layer: .*{words}") as refused:
        scheme(weight, act)
    assert ". Fix: " in str(refused.value)


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_packed_scales_have_the_dtype_of_the_model(dtype, scale):
    with pytest.raises(ExportError, match=f"Fix: quantize to int4/group128/{scale}, or export a float32 model"):
        scheme("int4/group128", dtype=dtype)
    assert scheme(f"int4/group128/{scale}", dtype=dtype) == scheme("int4/group128") == scheme("int4/group128/bf16")
    assert scheme("int8/row", "int8/row", dtype=dtype)  # whose scales are float32


def test_a_group_is_named_by_its_modules_where_there_are_several():
    one, two = scheme("int4/group128"), scheme("int8/row")
    alone = quantization_config({"a": one, "b": one}, ["c"])
    assert alone["config_groups"]["group_0"] == {"targets": ["Linear"], **one}
    assert alone["format"] == "pack-quantized" and alone["ignore"] == ["c"]
    both = quantization_config({"a": one, "b": one, "d": two, "e": scheme("fp8/row")}, [])
    assert [group["targets"] for group in both["config_groups"].values()] == [["d"], ["e"], ["a", "b"]]
    assert both["format"] == "mixed-precision"


def test_shapes_and_dtypes_of_all_tensors():
    model = quantized("int3/group64/zero/bf16", dtype=torch.bfloat16, bias=True)
    tensors, config, schemes = compressed_layout(model)
    path = "model.layers.0.self_attn.k_proj"  # [64, 128]
    found = {
        name.removeprefix(f"{path}."): (list(t.shape), t.dtype) for name, t in tensors.items() if name.startswith(path)
    }
    assert found == {
        "weight_packed": ([64, 12], torch.int32),
        "weight_scale": ([64, 2], torch.bfloat16),
        "weight_shape": ([2], torch.int64),
        "weight_zero_point": ([6, 2], torch.int32),
        "bias": ([64], torch.bfloat16),
    }
    assert len(schemes) == 7 and config["ignore"] == ["lm_head"]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
