"""Where a captured graph reads a stack of expert weights that is stored as codes.

The module that holds the codes has the name of the parameter that it replaced, and a suffix (modules/quant_experts.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from qcompile.ir.op_calls import DequantizeCall
from qcompile.ir.program import Program

STACK_SUFFIX = "_codes"  # of the submodule that takes the place of a parameter


def quantized_stacks(program: Program) -> Iterator[tuple[fx.Node, DequantizeCall, str]]:
    """Every dequantization of a stack [E, N, K], its view, and the path of the module that holds the codes."""
    for node, call in DequantizeCall.find(program):
        path = (program.weight_name(call.codes) or "").removesuffix(".codes")
        if path.endswith(STACK_SUFFIX) and node.meta["val"].ndim == 3:
            yield node, call, path


def stack_site(path: str) -> str:
    """The name of a stack's site, which is that of the parameter: of the path of the module that holds the codes."""
    return path.removesuffix(STACK_SUFFIX)
