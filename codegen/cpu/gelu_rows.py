"""GELU in front of a quantization of rows: one operator computes both.

Inductor (torch 2.13) writes what GELU gives to memory, and the product reads it twice to quantize it; its vectorized
tanh takes more than twice as long as its erf. `gelu_codes` of native_kernels.py gives codes and scales at once.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from qcompile.codegen.cpu.native_kernels import ops
from qcompile.ir.aten_ops import aten
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.op_calls import QuantizeCall
from qcompile.ir.program import Program


def fuse_gelu(program: Program) -> int:
    """Replace every GELU that only a quantization of rows reads, in place; gives how many.

    The same codes, but where a value is as near to the middle of two as float32 arithmetic is to float64.
    """
    made = 0
    for node in list(program.graph.nodes):
        if not QuantizeCall.matches(node):
            continue
        call = QuantizeCall.of(node)
        gelu = call.x
        if gelu.target is not aten.gelu.default or len(gelu.users) != 1 or call.format != "int8/row":
            continue
        if gelu.meta["val"].dtype not in (torch.float32, torch.bfloat16) or _is_written(gelu):
            continue
        tanh = gelu.kwargs.get("approximate", "none") == "tanh"
        both = program.insert(ops.gelu_codes.default, (gelu.args[0], tanh), before=gelu)
        for part in list(node.users):
            index = part.args[1] if part.target is operator.getitem else None
            if index in (0, 1):
                part.replace_all_uses_with(program.insert(operator.getitem, (both, index), before=node))
        made += 1
    program.cleanup()
    return made


def _is_written(gelu: fx.Node) -> bool:
    """Whether somebody writes into what it reads or gives, so that its place in the graph matters."""
    return any(node.meta.get(WRITTEN) for node in (gelu, *gelu.all_input_nodes))
