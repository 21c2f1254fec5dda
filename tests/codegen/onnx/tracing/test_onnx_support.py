"""Sites without an ONNX operator are refused at once, before any work."""

from __future__ import annotations

import os

import pytest
import torch
from quant_linears import linear
from torch import nn

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.codegen.onnx.tracing.onnx_support import (
    OnnxUnsupportedError,
    check_supported,
    has_int4_and_int8_kernels,
    unsupported_reason,
)
from qcompile.generation.onnx_session import FolderError, Session


def test_refusals(tmp_path):
    with pytest.raises(OnnxUnsupportedError, match="(?s)2 sites.*0: fp8.*1: int3.*Fix: "):
        qcompile.export_onnx(
            nn.Sequential(linear("fp8/row", "", 24), linear("int3/group32/zero", "", 24)), tmp_path / "m"
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        qcompile.export_onnx(nn.Sequential(linear("int8/row", "", 24)), tmp_path / "full", example=torch.randn(2, 24))
    with pytest.raises(FolderError, match="no model.onnx"):
        Session(tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"]


@pytest.mark.parametrize(
    "form,act,contrib_ops,words",
    [
        ("int4/group32/zero", "int8/row", True, None),
        ("int4/group32/floatzero", "", True, None),
        ("int4/group32/floatzero", "", False, "integer zero points"),
        ("int2/group32", "", False, "opset 21"),
        ("int8/tensor", "", True, "a scale for the whole weight"),
        ("int4/group24", "", True, "power of two"),
        ("int4/group8", "", True, "power of two"),
        ("int8/row", "int8/group32", True, "activation int8/group32"),
        ("int8/row", "fp8/row", True, "activation fp8"),
    ],
)
def test_the_reason_of_a_refusal(form, act, contrib_ops, words):
    reason = unsupported_reason(linear(form, act, 96), contrib_ops)
    assert reason is None if words is None else words in reason
    if words is None:
        check_supported(nn.Sequential(linear(form, act, 96)), contrib_ops)


@pytest.mark.parametrize(
    "form,act,both",
    [("int4/group32/dual", "int8/row", True), ("int4/group32/dual", "int8/tensor", True),
     ("int4/group32/dual", "int8/row/zero", False),
     ("int4/group32/dual", "int4/row", False), ("int4/group32", "int8/row", False), ("int4/group32/dual", "", False)],
)  # fmt: skip
def test_two_kernels_need_two_level_scales_and_symmetric_int8_activations(form, act, both):
    assert has_int4_and_int8_kernels(linear(form, act, 96)) == both
