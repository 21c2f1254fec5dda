"""Attentions over an int8 KV cache, for any number of tokens.

GroupQueryAttention reads such a cache. Decode waits for memory, of which int8 codes are a quarter: that is faster than
over floats. Prefill waits for products, and over codes ONNX Runtime computes them three times slower than over floats.
So an attention becomes one `If` on the number of new tokens of a text:

    decode    GroupQueryAttention over the codes
    prefill   GroupQueryAttention over the dequantized past; then the new keys and values are quantized

New tokens see each other as they are in prefill, rounded in decode; of the same keys and values both make the same
codes. A runtime may hand over a buffer that is longer than the past, to be extended in place: what lies behind is
handed back, so a prompt costs a copy of the whole buffer.

Up to about 2048 tokens GroupQueryAttention multiplies every new query by every key, those of later tokens too, and
keeps all scores [H, S, T] at once. A long prompt is therefore read in chunks, each behind the keys of those before:
the same values, 10 of 16 products, a quarter of the scores. It reads several tokens behind a cache for one text only,
so a batch is read at once; so is what follows a past of more than half its length, where models were not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.codegen.onnx.lowering.constants import Constants
from qcompile.codegen.onnx.lowering.graph_edits import make_branch, name_after, replace_node
from qcompile.codegen.onnx.lowering.op_inputs import CONTRIB, DOMAIN, GroupQueryAttention

DECODE_TOKENS = 4
"""Tokens that are multiplied by 4-bit codes (lower_graph.py), and that read an int8 KV cache by its codes.

One constant, so that the decode branch needs no second choice in its attentions. By benches/onnx_cpu.py.
"""

_OF_INT8_CACHE = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")
_FLOAT, _INT8 = ir.DataType.FLOAT, ir.DataType.INT8


@dataclass(frozen=True)
class ChunkedPrefill:
    """Which prompts are read in chunks, by benches/onnx_long_prompts.py.

    Attributes:
        chunks: how many.
        min_tokens: the least tokens of such a prompt.
        max_tokens: the most: GroupQueryAttention reads longer ones in blocks of its own.
        min_over_past: how many times its past it is at least.
    """

    chunks: int = 4
    min_tokens: int = 192
    max_tokens: int = 2047
    min_over_past: int = 2


CHUNKED_PREFILL = ChunkedPrefill()


@dataclass(frozen=True)
class Chunk:
    """A chunk of a prompt: its first and end among the new tokens [1], and GroupQueryAttention's inputs for it."""

    start: ir.Value
    end: ir.Value
    seqlens_k: ir.Value
    total_sequence_length: ir.Value


@dataclass(frozen=True)
class Lengths:
    """What all attentions of a graph ask for.

    Attributes:
        past: int64 [1], tokens before the new ones.
        total: int64 [1], both.
        is_decode: whether new tokens are few enough.
        is_chunked: whether they are one text's, and enough for `chunks`.
    """

    past: ir.Value
    total: ir.Value
    is_decode: ir.Value
    is_chunked: ir.Value
    chunks: Sequence[Chunk]


def has_int8_cache(node: ir.Node) -> bool:
    """Whether a node is an attention over int8 codes."""
    return node.op_type == "GroupQueryAttention" and GroupQueryAttention.of(node).k_scale is not None


def insert_lengths(node: ir.Node, ids: ir.Value) -> Lengths:
    """Of tokens `ids` [B, S], as an attention counts them; written before it."""
    tape, attention, config = Tape(), GroupQueryAttention.of(node), CHUNKED_PREFILL
    op, int64 = tape.op, Constants(node.graph).int64
    one = Constants(node.graph).tensor(np.array([1], np.int32))

    def both(a: ir.Value, b: ir.Value) -> ir.Value:
        return op("And", [a, b])

    new, texts = op("Shape", [ids], {"start": 1, "end": 2}), op("Shape", [ids], {"start": 0, "end": 1})
    total = op("Cast", [attention.total_sequence_length], {"to": ir.DataType.INT64})
    past = op("Sub", [total, new])
    is_decode = op("LessOrEqual", [new, int64(DECODE_TOKENS)])
    valid = op("Add", [op("ReduceMin", [attention.seqlens_k]), one])  # fewer than all: there is padding
    is_alone = both(op("Equal", [texts, int64(1)]), op("Equal", [valid, attention.total_sequence_length]))
    is_long = op("GreaterOrEqual", [new, int64(config.min_tokens)])
    is_long = both(is_long, op("LessOrEqual", [new, int64(config.max_tokens)]))
    is_ahead = op("LessOrEqual", [op("Mul", [past, int64(config.min_over_past)]), new])
    is_chunked = both(is_long, both(is_ahead, is_alone))
    size = op("Div", [op("Add", [new, int64(config.chunks - 1)]), int64(config.chunks)], name="chunk_size")
    bounds = [int64(0), *(op("Mul", [size, int64(i)]) for i in range(1, config.chunks)), new]
    chunks = []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        up_to = op("Cast", [op("Add", [past, end], name=f"total_{i}")], {"to": ir.DataType.INT32})
        chunks.append(Chunk(start, end, op("Sub", [up_to, one], name=f"seqlens_k_{i}"), up_to))
    name_after(tape.nodes, f"{DOMAIN}/lengths")
    node.prepend(tape.nodes)
    return Lengths(past, total, is_decode, is_chunked, chunks)


def split_by_length(node: ir.Node, lengths: Lengths) -> None:
    """Replace an attention over int8 codes by an `If` on the number of tokens."""
    decode = Tape()
    outputs = _attend(decode, GroupQueryAttention.of(node), node.attributes)
    branches = {
        "then_branch": make_branch("decode", decode, outputs, [_FLOAT, _INT8, _INT8]),
        "else_branch": _prefill(node, lengths),
    }
    tape = Tape()
    replace_node(node, tape, tape.op_multi_out("If", [lengths.is_decode], branches, num_outputs=3, name="by_length"))


def _attend(tape: Tape, inputs: GroupQueryAttention, attributes: dict[str, ir.Attr]) -> Sequence[ir.Value]:
    operator = "GroupQueryAttention"
    return tape.op_multi_out(operator, inputs.as_list(), attributes, num_outputs=3, domain=CONTRIB)


def _prefill(node: ir.Node, lengths: Lengths) -> ir.Graph:
    attention, constants, tape = GroupQueryAttention.of(node), Constants(node.graph), Tape()
    op, tokens, zero = tape.op, constants.int64(2), constants.int64(0)  # the axis of tokens
    end, one = constants.int64(np.iinfo(np.int64).max), constants.float32(1)
    middle = constants.tensor(np.array(0, np.int8))
    caches = {"key": (attention.past_key, attention.k_scale), "value": (attention.past_value, attention.v_scale)}
    codes = {name: op("Slice", [cache, zero, lengths.past, tokens]) for name, (cache, _) in caches.items()}
    past = {
        f"past_{name}": op("Mul", [op("Cast", [codes[name]], {"to": _FLOAT}), scale], name=f"past_{name}")
        for name, (_, scale) in caches.items()
    }
    floats = replace(attention, **past, k_scale=None, v_scale=None)
    attributes = {name: value for name, value in node.attributes.items() if name not in _OF_INT8_CACHE}
    out, *present = _attend_by_chunks(tape, floats, attributes, lengths, constants)
    extended = []
    for values, (name, (cache, scale)) in zip(present, caches.items(), strict=True):
        new = op("Slice", [values, lengths.past, lengths.total, tokens])
        rounded = op("QuantizeLinear", [op("Div", [new, scale], name=f"scaled_{name}"), one, middle])
        behind = op("Slice", [cache, lengths.total, end, tokens])
        extended.append(op("Concat", [codes[name], rounded, behind], {"axis": 2}))
    return make_branch("prefill", tape, [out, *extended], [_FLOAT, _INT8, _INT8])


def _attend_by_chunks(
    tape: Tape, attention: GroupQueryAttention, attributes: dict[str, ir.Attr], lengths: Lengths, constants: Constants
) -> Sequence[ir.Value]:
    """An attention over floats that reads a long prompt in chunks, unless it has positions or a bias of its own."""
    if attention.position_ids is not None or attention.attention_bias is not None:
        return _attend(tape, attention, attributes)
    at_once = Tape()
    whole = _attend(at_once, attention, attributes)
    chunked, axis, outputs = Tape(), constants.int64(1), []
    past_key, past_value = attention.past_key, attention.past_value
    for chunk in lengths.chunks:
        new = {
            name: value and chunked.op("Slice", [value, chunk.start, chunk.end, axis])
            for name, value in (("query", attention.query), ("key", attention.key), ("value", attention.value))
        }
        counts = dict(seqlens_k=chunk.seqlens_k, total_sequence_length=chunk.total_sequence_length)
        part = replace(attention, **new, **counts, past_key=past_key, past_value=past_value)
        out, past_key, past_value = _attend(chunked, part, attributes)
        outputs.append(out)
    joined = chunked.op("Concat", outputs, {"axis": 1})
    branches = {
        "then_branch": make_branch("chunks", chunked, [joined, past_key, past_value], [_FLOAT] * 3),
        "else_branch": make_branch("at_once", at_once, whole, [_FLOAT] * 3),
    }
    return tape.op_multi_out("If", [lengths.is_chunked], branches, num_outputs=3, name="by_chunks")
