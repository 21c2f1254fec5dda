"""Attentions over a cache of int8 codes, for any number of tokens.

GroupQueryAttention reads such a cache. One token waits for memory, of which codes are a quarter: that is faster than
over floats. A prompt waits for products, and over codes ONNX Runtime computes them three times slower than over floats.
So an attention becomes one `If` on the number of tokens of a text:

    few     GroupQueryAttention over the codes
    many    the past turned to float, GroupQueryAttention over that, and the new keys and values turned to codes

New tokens see each other as they are in the second, rounded in the first; of the same keys and values both make the
same codes. A runtime may hand over a buffer that is longer than the past, to be extended in place: what lies behind is
handed back, so a prompt costs a copy of the whole buffer.

Up to about 2048 tokens GroupQueryAttention multiplies every new query by every key, those of later tokens too, and
holds all scores [H, S, T] at once. A long prompt is therefore read in pieces, each behind the keys of those before: the
same numbers, 10 of 16 products, a quarter of the scores. It reads several tokens behind a cache for one row only, so
several rows go at once; so does what follows a past of more than half its length: whole models were not measured there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompile.codegen.onnx.lowering.node_builder import FEW, Steps

# Of a prompt that is read in pieces: how many, its least and most tokens, and how many times what is past it must be.
_PIECES, LONG, _LONGEST, _AHEAD = 4, 192, 2047, 2  # by benches/onnx_long_prompts.py

# Inputs of GroupQueryAttention.
_PAST, _LAST, _TOTAL, _POSITIONS, _BIAS, _SCALES = slice(3, 5), 5, 6, 9, 10, slice(12, 14)
_OF_CODES = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")


def is_coded(node: onnx.NodeProto) -> bool:
    """Whether a node is an attention over codes."""
    return node.op_type == "GroupQueryAttention" and len(node.input) > _SCALES.start


@dataclass(frozen=True)
class Piece:
    """Names: where a piece of a prompt starts and ends, the place of its last token, and all tokens up to there."""

    start: str
    end: str
    last: str
    total: str


@dataclass(frozen=True)
class Lengths:
    """What all attentions ask for, made by `nodes`: how many tokens are past and past and new, and what is to be done.

    Attributes:
        is_few: whether new tokens are few. is_long: whether they are one row's, and many enough for `pieces`.
    """

    nodes: list[onnx.NodeProto]
    past: str
    total: str
    is_few: str
    is_long: str
    pieces: list[Piece]


def lengths(ids: str, attention: onnx.NodeProto, constant: Callable[[np.ndarray], str]) -> Lengths:
    """Of tokens `ids` [B, S], as one of the attentions counts them. constant: the name of a constant."""
    do = Steps("cache")

    def whole(value: int) -> str:
        return constant(np.array([value], np.int64))

    new, rows = do("new", "Shape", ids, start=1, end=2), do("rows", "Shape", ids, start=0, end=1)
    total = do("total", "Cast", attention.input[_TOTAL], to=TensorProto.INT64)
    past, one = do("past", "Sub", total, new), constant(np.array([1], np.int32))
    is_few = do("few", "LessOrEqual", new, whole(FEW))
    seen = do("seen", "Add", do("least", "ReduceMin", attention.input[_LAST]), one)  # less than all: there is padding
    alone = do("alone", "And", do("row", "Equal", rows, whole(1)), do("full", "Equal", seen, attention.input[_TOTAL]))
    least, most = do("enough", "GreaterOrEqual", new, whole(LONG)), do("fewer", "LessOrEqual", new, whole(_LONGEST))
    ahead = do("ahead", "LessOrEqual", do("most_past", "Mul", past, whole(_AHEAD)), new)
    is_long = do("long", "And", do("between", "And", least, most), do("wins", "And", ahead, alone))
    share = do("share", "Div", do("filled", "Add", new, whole(_PIECES - 1)), whole(_PIECES))
    bounds = [whole(0), *(do(f"bound_{i}", "Mul", share, whole(i)) for i in range(1, _PIECES)), new]
    pieces = []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        up_to = do(f"total_{i}", "Cast", do(f"up_to_{i}", "Add", past, end), to=TensorProto.INT32)
        pieces.append(Piece(start, end, do(f"last_{i}", "Sub", up_to, one), up_to))
    return Lengths(do.nodes, past, total, is_few, is_long, pieces)


def by_length(node: onnx.NodeProto, known: Lengths, constant: Callable[[np.ndarray], str]) -> onnx.NodeProto:
    """The attention as an `If`."""
    direct = copy.deepcopy(node)
    direct.output[:] = [f"{node.name}/few/{i}" for i in range(3)]
    branches = {
        "then_branch": _graph("few", [direct], list(direct.output), TensorProto.INT8),
        "else_branch": _graph("many", *_over_floats(node, known, constant), TensorProto.INT8),
    }
    return helper.make_node("If", [known.is_few], list(node.output), name=f"{node.name}/by_length", **branches)


def _graph(name: str, nodes: list[onnx.NodeProto], outputs: list[str], cache: int) -> onnx.GraphProto:
    kinds = (TensorProto.FLOAT, cache, cache)
    infos = [helper.make_tensor_value_info(out, kind, None) for out, kind in zip(outputs, kinds, strict=True)]
    return helper.make_graph(nodes, name, [], infos)


def _over_floats(
    node: onnx.NodeProto, known: Lengths, constant: Callable[[np.ndarray], str]
) -> tuple[list[onnx.NodeProto], list[str]]:
    """Nodes, and the names of their outputs."""
    tokens, start = constant(np.array([2], np.int64)), constant(np.array([0], np.int64))
    end = constant(np.array([np.iinfo(np.int64).max], np.int64))
    one, middle = constant(np.array(1, np.float32)), constant(np.array(0, np.int8))
    do = Steps(f"{node.name}/many")
    over = copy.deepcopy(node)
    del over.input[_SCALES.start :], over.attribute[:]
    over.attribute.extend(attribute for attribute in node.attribute if attribute.name not in _OF_CODES)
    held = []
    for at, scale, which in zip((3, 4), node.input[_SCALES], ("key", "value"), strict=True):
        codes = do(f"{which}_codes", "Slice", node.input[at], start, known.past, tokens)
        over.input[at] = do(f"{which}_past", "Mul", do(f"{which}_cast", "Cast", codes, to=TensorProto.FLOAT), scale)
        held.append((which, codes, node.input[at], scale))
    while not over.input[-1]:
        over.input.pop()
    over.name, over.output[:] = f"{do.name}/float", [f"{do.name}/{i}" for i in range(3)]
    do.nodes.append(_by_pieces(over, known, constant))
    outputs = [over.output[0]]
    for numbers, (which, codes, whole, scale) in zip(over.output[1:], held, strict=True):
        new = do(f"{which}_new", "Slice", numbers, known.past, known.total, tokens)
        rounded = do(f"{which}_rounded", "QuantizeLinear", do(f"{which}_units", "Div", new, scale), one, middle)
        behind = do(f"{which}_behind", "Slice", whole, known.total, end, tokens)
        outputs.append(do(f"{which}_grown", "Concat", codes, rounded, behind, axis=2))
    return do.nodes, outputs


def _by_pieces(node: onnx.NodeProto, known: Lengths, constant: Callable[[np.ndarray], str]) -> onnx.NodeProto:
    """An attention over floats that reads a long prompt in pieces; one with positions or a bias of its own as it is."""
    if any(node.input[_POSITIONS : _BIAS + 1]):
        return node
    at_once = copy.deepcopy(node)
    at_once.output[:] = [f"{node.name}/at_once/{i}" for i in range(3)]
    do, axis = Steps(f"{node.name}/pieces"), constant(np.array([1], np.int64))
    seen, cache = [], list(node.input[_PAST])
    for i, piece in enumerate(known.pieces):
        named = zip(("query", "key", "value"), node.input, strict=False)
        new = [do(f"{which}_{i}", "Slice", x, piece.start, piece.end, axis) if x else "" for which, x in named]
        part = copy.deepcopy(node)
        part.name = f"{do.name}/{i}"
        part.input[: _TOTAL + 1] = [*new, *cache, piece.last, piece.total]
        part.output[:] = [f"{part.name}/{made}" for made in ("seen", "keys", "values")]
        do.nodes.append(part)
        seen.append(part.output[0])
        cache = list(part.output[1:])
    do("seen", "Concat", *seen, axis=1)
    branches = {
        "then_branch": _graph("pieces", do.nodes, [do.nodes[-1].output[0], *cache], TensorProto.FLOAT),
        "else_branch": _graph("at_once", [at_once], list(at_once.output), TensorProto.FLOAT),
    }
    return helper.make_node("If", [known.is_long], list(node.output), name=f"{node.name}/by_pieces", **branches)
