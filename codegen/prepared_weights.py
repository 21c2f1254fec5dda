"""The stored tensors of a site, and the layouts that kernels read of them: shared by lowering to cpu/ and triton/."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx

from qcompile.ir.op_calls import QLinearCall
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember
from qcompile.numerics.qtensor import StoredParts

Make = Callable[[], tuple[Tensor | None, ...]]
"""Makes a kernel's layout; None stands for a tensor that the format does not have."""


def stored_weight(program: Program, call: QLinearCall) -> StoredParts:
    """The tensors behind a call's placeholders (see QTensor). Raises KeyError if one is computed in the graph."""
    codes, scale, *optional = call.stored
    zero, group_scale = (None if operand is None else program.weight_of(operand) for operand in optional)
    return program.weight_of(codes), program.weight_of(scale), zero, group_scale


def weight_names(program: Program, calls: Sequence[QLinearCall]) -> str:
    """A name for the weights of some calls together, which no other weights have.

    One weight may be merged with others in one place of a graph, and with still others, or alone, in another; and equal
    codes may have other scales.
    """
    return tensor_names(program, [part for call in calls for part in call.stored if part is not None])


def tensor_names(program: Program, tensors: Sequence[fx.Node]) -> str:
    """A name for some weights of a program together, which no other weights have."""
    return " + ".join(str(program.weight_name(tensor)) for tensor in tensors)


def prepared_weights(
    program: Program, calls: Sequence[QLinearCall], layout: str, remember: Remember, make: Make
) -> list[fx.Node]:
    """Placeholders of what a kernel reads of a site, added to the program where they are new.

    Args:
        program: holds the stored weights.
        calls: the site, or those whose weights the kernel reads as one.
        layout: a name for what `make` makes; with the weight's name it names the new weights.
        remember: see weight_cache.py: equal stored weights are prepared once, whatever the number of graphs.
        make: called if no graph has prepared an equal weight.

    Returns:
        One node for each tensor that `make` returns, those that are None omitted.
    """

    def present() -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in make() if tensor is not None)

    sources = [tensor for call in calls for tensor in stored_weight(program, call) if tensor is not None]
    prefix, nodes = weight_names(program, calls), []
    for index, tensor in enumerate(remember(layout, sources, present)):
        name = f"{prefix}.{layout}.{index}"
        nodes.append(program.node_of(name) if name in program.weights else program.add_weight(name, tensor))
    return nodes
