"""Logits of the last token only: what generation reads of a prompt.

The product that makes the logits has the largest matrix of a small model. It gets one row for each text, the last
token's, which is not the last position where shorter texts of a batch are padded behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.packed_matmul import linear_call
from qcompile.codegen.onnx.ops.matmul_ops import BlockedLinearCall, DualLinearCall
from qcompile.ir.aten_ops import CASTS, Ops
from qcompile.ir.program import Program

aten = torch.ops.aten

_TOKENWISE: Ops = CASTS | {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.tanh.default}
"""What may stand between the product and the output: a soft cap, a cast, a factor."""


def keep_last_token_logits(program: Program) -> Obstacle | None:
    """Let a decoder (ids [B, S], attention_mask [B, P + S], caches ..) return logits [B, 1, V], in place.

    Returns:
        What stands in the way; the program is unchanged then. None: nothing.
    """
    node = program.outputs[0]
    while (call := linear_call(program, node)) is None and not BlockedLinearCall.matches(node):
        upstream = [n for n in node.all_input_nodes if program.weight_name(n) is None]
        if node.target not in _TOKENWISE or len(upstream) != 1:
            return Obstacle(node.name, "the product that makes the logits is not found")
        node = upstream[0]
    x = (BlockedLinearCall.of(node) if call is None else call).x
    if x.meta["val"].ndim != 3:
        return Obstacle(node.name, "batch and tokens are one dimension before the logits")
    last = program.inline(last_tokens, [x, program.inputs[1]], before=node)
    node.replace_input_with(x, last)
    if DualLinearCall.matches(node):  # one row of each text: its int8 weight is not needed
        decode = DualLinearCall.of(node).without_int8().insert(program, before=node)
        node.replace_all_uses_with(decode)
        program.graph.erase_node(node)
    program.cleanup()
    return None


def last_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, S, K] of the last S tokens of mask [B, P + S] -> [B, 1, K], each text's last that is not padding."""
    index = mask.sum(1) - 1 - (mask.shape[1] - x.shape[1])
    return x.gather(1, index.clamp_min(0)[:, None, None].expand(-1, 1, x.shape[2]))
