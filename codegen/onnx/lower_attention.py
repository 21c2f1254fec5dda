"""Attentions over a cache of int8 codes, for any number of tokens.

GroupQueryAttention reads such a cache. One token waits for memory, of which codes are a quarter: that is faster than
over floats. A prompt waits for products, and over codes ONNX Runtime computes them three times slower than over floats.
So an attention becomes one `If` on the number of tokens of a text:

    few     GroupQueryAttention over the codes
    many    the past turned to float, GroupQueryAttention over that, and the new keys and values turned to codes

New tokens see each other as they are in the second, rounded in the first; of the same keys and values both make the
same codes. A runtime may hand over a buffer that is longer than the past, to be extended in place: what lies behind is
handed back, so a prompt costs a copy of the whole buffer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompile.codegen.onnx.steps import FEW, Steps, attributes_of

_TOTAL, _SCALES = 6, slice(12, 14)  # inputs of GroupQueryAttention
_OF_CODES = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")


def is_coded(node: onnx.NodeProto) -> bool:
    """Whether a node is an attention over codes."""
    return node.op_type == "GroupQueryAttention" and len(node.input) > _SCALES.start


def lengths(ids: str, attention: onnx.NodeProto, constant: Callable[[np.ndarray], str]) -> list[onnx.NodeProto]:
    """Nodes that make what all attentions ask for: whether tokens are few, their past, and both together.

    Args:
        ids: [B, S]. attention: one of them. constant: the name of a constant.
    """
    do = Steps("cache")
    new = do("new", "Shape", ids, start=1, end=2)
    do("few", "LessOrEqual", new, constant(np.array([FEW], np.int64)))
    total = do("total", "Cast", attention.input[_TOTAL], to=TensorProto.INT64)
    do("past", "Sub", total, new)
    return do.nodes


def by_length(
    node: onnx.NodeProto, known: list[onnx.NodeProto], constant: Callable[[np.ndarray], str]
) -> onnx.NodeProto:
    """The attention as an `If`; `known` as lengths() made it."""
    _, is_few, total, past = (made.output[0] for made in known)
    direct = copy.deepcopy(node)
    direct.output[:] = [f"{node.name}/few/{i}" for i in range(3)]
    branches = {
        "then_branch": _graph("few", [direct], list(direct.output)),
        "else_branch": _graph("many", *_over_floats(node, past, total, constant)),
    }
    return helper.make_node("If", [is_few], list(node.output), name=f"{node.name}/by_length", **branches)


def _graph(name: str, nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.GraphProto:
    kinds = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8)
    infos = [helper.make_tensor_value_info(out, kind, None) for out, kind in zip(outputs, kinds, strict=True)]
    return helper.make_graph(nodes, name, [], infos)


def _over_floats(
    node: onnx.NodeProto, past: str, total: str, constant: Callable[[np.ndarray], str]
) -> tuple[list[onnx.NodeProto], list[str]]:
    """Nodes, and the names of their outputs."""
    tokens, start = constant(np.array([2], np.int64)), constant(np.array([0], np.int64))
    end = constant(np.array([np.iinfo(np.int64).max], np.int64))
    one, middle = constant(np.array(1, np.float32)), constant(np.array(0, np.int8))
    do = Steps(f"{node.name}/many")
    inputs, held = list(node.input[: _SCALES.start]), []
    for at, scale, which in zip((3, 4), node.input[_SCALES], ("key", "value"), strict=True):
        codes = do(f"{which}_codes", "Slice", node.input[at], start, past, tokens)
        inputs[at] = do(f"{which}_past", "Mul", do(f"{which}_cast", "Cast", codes, to=TensorProto.FLOAT), scale)
        held.append((which, codes, node.input[at], scale))
    while not inputs[-1]:
        inputs.pop()
    how: dict[str, Any] = {name: value for name, value in attributes_of(node).items() if name not in _OF_CODES}
    out, *grown = (f"{do.name}/{part}" for part in ("output", "grown_keys", "grown_values"))
    do.nodes.append(
        helper.make_node(node.op_type, inputs, [out, *grown], name=f"{do.name}/float", domain=node.domain, **how)
    )
    outputs = [out]
    for numbers, (which, codes, whole, scale) in zip(grown, held, strict=True):
        new = do(f"{which}_new", "Slice", numbers, past, total, tokens)
        rounded = do(f"{which}_rounded", "QuantizeLinear", do(f"{which}_units", "Div", new, scale), one, middle)
        behind = do(f"{which}_behind", "Slice", whole, total, end, tokens)
        outputs.append(do(f"{which}_grown", "Concat", codes, rounded, behind, axis=2))
    return do.nodes, outputs
