"""From the graph of an export, with quantized linears as nodes of our own, to nodes that a runtime has.

    Int8Linear      int8 matmul (matmul_integer.py), for any number of rows
    DualLinear      there are two variants
                        decode      MatMulNBits on the int4 codes: it waits for memory, which holds 4 bits
                        prefill     int8 matmul on s1 (q - z), which the processor multiplies directly
    BlockedLinear   with standard operators: DequantizeLinear and MatMul
    GroupQueryAttention over int8 codes     an `If` on the number of tokens (int8_kv_attention.py)

The file holds the 4-bit codes, s_row and s1 once (compact_scales.py): s1 (q - z) is computed from the same bytes, which
ONNX Runtime does when it opens the file (constant folding). A decoder becomes one `If` on its number of tokens around
the whole graph, whose two branches share all weights; an `If` on that around every matmul would cost a frame each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.codegen.onnx.lowering.constants import Constants
from qcompile.codegen.onnx.lowering.graph_edits import (
    clean_up,
    constant_nodes,
    move_to_branch,
    name_after,
    replace_node,
    share_outer_values,
)
from qcompile.codegen.onnx.lowering.int8_kv_attention import (
    DECODE_TOKENS,
    Lengths,
    has_int8_cache,
    insert_lengths,
    split_by_length,
)
from qcompile.codegen.onnx.lowering.int8_weight import Int8Weight
from qcompile.codegen.onnx.lowering.matmul_integer import Int8Matmul, exactness
from qcompile.codegen.onnx.lowering.matmul_nbits import dequantize_matmul, matmul_nbits, with_bias
from qcompile.codegen.onnx.lowering.op_inputs import DOMAIN, DualLinear, Int8Linear
from qcompile.codegen.onnx.lowering.unpack_matmul import unpack_matmuls

Variant = Literal["decode", "prefill"]


def has_dual_linears(model: ir.Model) -> bool:
    """Whether a graph has matmuls of two variants."""
    return any(node.op_type == "DualLinear" for node in model.graph)


def lower(model: ir.Model, variant: Variant, *, contrib_ops: bool = True, any_length: bool = True) -> ir.Model:
    """A copy in which every matmul is of one variant.

    Args:
        model: as exported.
        variant: of the matmuls of DualLinear.
        contrib_ops: use ONNX Runtime's operators; else those of the ONNX standard only.
        any_length: whether texts may have more than DECODE_TOKENS tokens; else attentions stay as they are.
    """
    lowered = model.clone()
    _Lowering(lowered.graph, variant, contrib_ops).run(any_length)
    clean_up(lowered)
    return lowered


def lower_by_tokens(model: ir.Model, decode_tokens: int = DECODE_TOKENS) -> ir.Model:
    """A copy with both variants: decode where the first input [B, S] has at most so many tokens, else prefill."""
    decode, lowered = lower(model, "decode", any_length=False), lower(model, "prefill")
    graph = lowered.graph
    outputs = [ir.val(value.name, type=value.type, shape=value.shape) for value in graph.outputs]
    share_outer_values(decode.graph, graph)
    then_branch, else_branch = move_to_branch(decode.graph, "decode"), move_to_branch(graph, "prefill")
    tape = Tape()
    limit = Constants(graph).tensor(np.array(decode_tokens, np.int64))
    is_decode = tape.op("LessOrEqual", [tape.op("Size", [graph.inputs[0]]), limit])
    name_after(tape.nodes, f"{DOMAIN}/tokens")
    branches = {"then_branch": then_branch, "else_branch": else_branch}
    choice = ir.node("If", [is_decode], branches, outputs=outputs, name=f"{DOMAIN}/decode_or_prefill")
    graph.extend([*tape.nodes, choice])
    graph.outputs.extend(outputs)
    return lowered


class _Lowering:
    """One graph, changed in place."""

    def __init__(self, graph: ir.Graph, variant: Variant, contrib_ops: bool) -> None:
        self.graph, self.variant, self.contrib_ops = graph, variant, contrib_ops
        self.constants = Constants(graph)
        self.weight_nodes: list[ir.Node] = []  # compute with initializers only
        self.int8_weights: dict[DualLinear, Int8Weight] = {}  # by the inputs that they are computed from
        self.exact: ir.Value | None = None
        self.lengths: Lengths | None = None

    def run(self, any_length: bool) -> None:
        """Lower all nodes, those that compute with initializers only first."""
        if self.variant == "prefill":
            unpack_matmuls(self.graph)
        self.weight_nodes += constant_nodes(self.graph)
        self.graph.remove(self.weight_nodes)
        for node in list(self.graph):
            if node.domain == DOMAIN:
                tape = Tape()
                replace_node(node, tape, [self._matmul(tape, node)])
            elif any_length and has_int8_cache(node):
                self.lengths = self.lengths or insert_lengths(node, self.graph.inputs[0])
                split_by_length(node, self.lengths)
        self.graph.insert_before(self.graph[0], self.weight_nodes)

    def _matmul(self, tape: Tape, node: ir.Node) -> ir.Value:
        """The output of a quantized linear."""
        if node.op_type == "Int8Linear":
            return self._int8_matmul(tape, node, Int8Weight.stored(node), Int8Linear.of(node).bias)
        if node.op_type == "BlockedLinear":
            return dequantize_matmul(tape, node)
        if self.variant == "decode":
            return matmul_nbits(tape, node)
        return self._int8_matmul(tape, node, self._int8_weight(node), DualLinear.of(node).bias)

    def _int8_matmul(self, tape: Tape, node: ir.Node, weight: Int8Weight, bias: ir.Value | None) -> ir.Value:
        if self.contrib_ops and self.exact is None:
            self.weight_nodes += exactness(self.constants)
            self.exact = self.weight_nodes[-1].outputs[0]
        matmul = Int8Matmul(tape, self.constants, self.exact)
        y = matmul.multiply(node.inputs[0], weight, bool(node.attributes["per_row"].as_int()))
        return with_bias(tape, y, bias)

    def _int8_weight(self, node: ir.Node) -> Int8Weight:
        """That of a DualLinear, computed once for all that read the same codes and scales."""
        key = replace(DualLinear.of(node), x=None, bias=None)
        if key not in self.int8_weights:
            tape = Tape()
            self.int8_weights[key] = Int8Weight.computed(tape, self.constants, node)
            name_after(tape.nodes, f"{node.name}/int8_weight")
            self.weight_nodes += tape.nodes
        return self.int8_weights[key]
