"""Logits of the last token only: what generating reads of a prompt, and all that a chat needs.

The product that makes the logits is the largest matrix of a small model. It gets one row for each text, the last
token's, which is not the last place where shorter texts of a batch are padded behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.packed_matmul import is_product
from qcompile.ir.program import Program

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx

_TOKENWISE = {  # between the product and the output: a soft cap, a cast, a factor
    aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten._to_copy.default, aten.to.dtype, aten.add.Tensor,
}  # fmt: skip


def only_last(program: Program) -> Obstacle | None:
    """Let a decoder (ids [B, S], attention_mask [B, P + S], caches ..) give logits [B, 1, V], in place."""
    node = program.outputs[0]
    while node.target is not ops.blocked_linear.default and not is_product(program, node):
        before = [n for n in node.all_input_nodes if program.weight_name(n) is None]
        if node.target not in _TOKENWISE or len(before) != 1:
            return Obstacle(node.name, "the product that makes the logits is not found")
        node = before[0]
    x = node.args[0]
    if x.meta["val"].ndim != 3:
        return Obstacle(node.name, "rows and tokens are one dimension before the logits")
    last = program.inline(last_tokens, [x, program.inputs[1]], before=node)
    node.replace_input_with(x, last)
    if node.target is ops.dual_linear.default:  # few rows always: no need to hold its codes in 8 bits too
        x, codes, scales, zeros, bias, k, bits, block, *_ = node.args
        few = program.insert(ops.nbits_linear.default, (x, codes, scales, zeros, bias, k, bits, block), before=node)
        node.replace_all_uses_with(few)
        program.graph.erase_node(node)
    program.cleanup()
    return None


def last_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, S, K] of the last S tokens that mask [B, P + S] counts -> [B, 1, K], each text's last."""
    at = mask.sum(1) - 1 - (mask.shape[1] - x.shape[1])
    return x.gather(1, at.clamp_min(0)[:, None, None].expand(-1, 1, x.shape[2]))
