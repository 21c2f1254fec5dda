"""Operators that write into their operands: what memory they write to, and how they become functional.

Analyses read a graph as if every node gave a new value. `functional_writes` makes that so wherever nothing else reads
the memory; operators that must stay in place keep their place in the graph, and `written_memory` tells whom they
concern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.aten_ops import ALIASES, DROPOUTS, SPLITS, aten, reads_elements
from qcompile.ir.program import Program


def functional_writes(program: Program) -> None:
    """`x.op_(..)` becomes `x.op(..)` where nothing else reads the memory of x; later readers of x read the result."""
    for node in list(program.graph.nodes):
        functional = _functional_form(node)
        if functional is None or not isinstance(node.args[0], fx.Node):
            continue
        _read_result(node)
        if _owns_memory(node) and _gives_the_same(program, node, functional):
            node.target = functional


def written_memory(program: Program) -> set[int]:
    """The identities (see `memory_of`) of all memory that operators of a graph write to."""
    found = set[int]()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for argument, operand in zip(schema.arguments, node.args, strict=False):
            memory = memory_of(operand) if argument.is_write and isinstance(operand, fx.Node) else None
            found |= set() if memory is None else {memory}
    return found


def memory_of(node: fx.Node) -> int | None:
    """An identity of the memory that a value, or a list of values, lies in; None for anything but tensors."""
    while is_off(node) and isinstance(node.args[0], fx.Node):  # gives its input, which fake tensors do not
        node = node.args[0]
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return storage_identity(value) if isinstance(value, Tensor) else None


def storage_identity(tensor: Tensor) -> int:
    """Of the memory that a tensor lies in, also where a vmap calls with a part of it; no address: fakes have none."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    identity: int = tensor.untyped_storage()._cdata
    return identity


def is_off(node: fx.Node) -> bool:
    """Whether a node is a dropout in evaluation, which gives its input; arguments: input, p, train."""
    return node.target in DROPOUTS and len(node.args) > 2 and node.args[2] is False


def _functional_form(node: fx.Node) -> Any:
    """The operator that gives as a new tensor what an in-place one writes into its first operand; None for others."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.startswith("_") or not target._schema.is_mutable or target in ALIASES:
        return None
    return getattr(getattr(aten, name[:-1], None), target._overloadname, None)


def _read_result(inplace: fx.Node) -> None:
    """What reads the written tensor behind an in-place operator reads the operator's result: the same tensor."""
    written = inplace.args[0]
    assert isinstance(written, fx.Node)
    for user in [user for user in written.users if user is not inplace and inplace < user]:
        user.replace_input_with(written, inplace)


def _gives_the_same(program: Program, inplace: fx.Node, functional: Any) -> bool:
    """Whether the functional form gives a tensor of the same dtype and shape; in place, the dtype cannot change."""
    args, kwargs = fx.node.map_arg((inplace.args, inplace.kwargs), lambda n: n.meta["val"])
    try:
        with program.fake_mode, torch.no_grad():
            value = functional(*args, **kwargs)
    except (RuntimeError, TypeError):  # no fake implementation, or a result that is no tensor of this shape
        return False
    written = inplace.meta["val"]
    same: bool = value.dtype == written.dtype and value.shape == written.shape
    return same


def _owns_memory(inplace: fx.Node) -> bool:
    """Whether nothing but its result reads, behind a node, the memory that it writes to."""
    node: Any = inplace.args[0]
    consumer, memory = inplace, memory_of(node)
    while memory is not None and node.op == "call_function":  # else it is of the caller, or a weight
        others = [user for user in node.users if user is not consumer and reads_elements(user, node)]
        others = [user for user in others if inplace < user or memory_of(user) == memory]  # a view may be read later
        if node.target in SPLITS:  # whose parts do not overlap
            others = [user for user in others if user.args[1] == consumer.args[1]]
        if others:
            return False
        source = next((n for n in node.all_input_nodes if memory_of(n) == memory), None)
        if source is None:
            return True
        node, consumer = source, node
    return False
