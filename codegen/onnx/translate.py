"""From our operators to ONNX nodes: the translation table for torch.onnx.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset21 as op
from onnxscript.values import Opset

import qcompile.codegen.onnx.linear  # noqa: F401  registers the operators

_DOMAIN = "com.microsoft"


def _declare_matmul_nbits() -> None:
    """ONNX ships no schemas of ONNX Runtime's own domain; the tracer needs this one."""
    if onnx.defs.has("MatMulNBits", _DOMAIN):
        return
    schema = onnx.defs.OpSchema
    numbers = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    optional = schema.FormalParameterOption.Optional
    onnx.defs.register_schema(
        schema(
            "MatMulNBits",
            _DOMAIN,
            1,
            inputs=[
                schema.FormalParameter("A", "T1"),
                schema.FormalParameter("B", "T2"),
                schema.FormalParameter("scales", "T1"),
                schema.FormalParameter("zero_points", "T3", param_option=optional),
            ],
            outputs=[schema.FormalParameter("Y", "T1")],
            type_constraints=[
                ("T1", numbers, "float"),
                ("T2", ["tensor(uint8)"], "packed codes"),
                ("T3", ["tensor(uint8)", *numbers], "packed or float zero points"),
            ],
            attributes=[
                schema.Attribute(name, onnx.defs.OpSchema.AttrType.INT, required=required)
                for name, required in (
                    ("K", True),
                    ("N", True),
                    ("bits", False),
                    ("block_size", True),
                    ("accuracy_level", False),
                )
            ],
        )
    )


def _matmul_nbits(x: Any, codes: Any, scales: Any, zeros: Any, n: int, k: int, bits: int, block: int) -> Any:
    _declare_matmul_nbits()
    microsoft = Opset(_DOMAIN, 1)
    # accuracy_level 1 is float32 compute: levels that quantize x by blocks would change the meaning.
    return microsoft.MatMulNBits(x, codes, scales, zeros, K=k, N=n, bits=bits, block_size=block, accuracy_level=1)


def _matmul_integer(x: Any, weight: Any) -> Any:
    return op.MatMulInteger(
        x, weight, op.Constant(value=_scalar(128, np.uint8)), op.Constant(value=_scalar(0, np.int8))
    )


def _scalar(value: int, dtype: Any) -> Any:
    return onnx.numpy_helper.from_array(np.array(value, dtype=dtype))


def table() -> dict[Any, Callable[..., Any]]:
    """Operator -> translation."""
    return {
        torch.ops.qcompile_onnx.matmul_nbits.default: _matmul_nbits,
        torch.ops.qcompile_onnx.matmul_integer.default: _matmul_integer,
    }
