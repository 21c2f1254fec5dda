"""One form for one meaning: what capture does before any pass looks.

no-ops       same-dtype casts, aliases, dropout in evaluation, metadata asserts, whole slices go away; a `contiguous`
             that copies stays, since views behind it may be legal for its strides only
x += y       becomes x + y where nothing else reads the memory of x, and so does every other operator in place
baddbmm      becomes its product, its factors and its sum
products     with a 2-D weight become aten.linear(x, W [N, K], bias); a computed bias is a sum behind the product
tied weights a tensor with several attribute paths gets one placeholder; `Program.aliases` keeps the others
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from qcompile.ir.aten_ops import ALIASES, CASTS, DROPOUTS, LINEAR, TRANSPOSES, aten
from qcompile.ir.in_place import functional_writes, is_off, memory_of, written_memory
from qcompile.ir.node_meta import WEIGHT, WRITTEN
from qcompile.ir.program import Program

_WHOLE = 2**62  # slices up to here or more reach the end of the dimension


def normalize(program: Program, note_as_captured: Callable[[Program], None] | None = None) -> Program:
    """Bring a freshly captured program to the form that passes expect; in place.

    Args:
        program: one graph, as captured.
        note_as_captured: called while casts and dropouts that do nothing in this call are still there.
    """
    _inline_grad_scopes(program)
    _merge_tied(program)
    if note_as_captured is not None:
        note_as_captured(program)
    functional_writes(program)  # first, while a copy that is a no-op otherwise is still there
    _drop_noops(program)
    _decompose_baddbmm(program)
    _products_to_linear(program)
    _computed_biases_to_sums(program)
    program.cleanup()
    return program


def _inline_grad_scopes(program: Program) -> None:
    """`with torch.no_grad():` becomes a higher-order op in an export: splice its body in."""
    graph, module = program.graph, program.graph_module
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op != "call_function" or name not in (
            "wrap_with_set_grad_enabled",
            "wrap_with_autocast",
        ):
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        body = getattr(module, str(node.args[at].target))
        memo = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[at + 1 :], strict=True))
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op not in ("placeholder", "output"):
                    memo[inner] = graph.node_copy(inner, lambda n, memo=memo: memo[n])
        returned = next(iter(body.graph.find_nodes(op="output"))).args[0]
        results = [memo[r] if isinstance(r, fx.Node) else r for r in returned]
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)


def _merge_tied(program: Program) -> None:
    """Several attribute paths of one tensor: the first keeps its placeholder."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in program.placeholders:
        name = node.meta.get(WEIGHT)
        if name is None:
            continue
        tensor = program.weights[name]
        memory = tensor.untyped_storage()._cdata  # not an address: those of all fake and empty tensors are 0
        key = (memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if first.setdefault(key, node) is node:
            continue
        owner = first[key]
        program.aliases.setdefault(owner.meta[WEIGHT], []).append(name)
        node.replace_all_uses_with(owner)


def _drop_noops(program: Program) -> None:
    graph = program.graph
    written = written_memory(program)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _is_noop(node, written):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif memory_of(node) in written:
            node.meta[WRITTEN] = True


def _is_noop(node: fx.Node, written: set[int]) -> bool:
    """Whether a node gives its first operand: the same elements at the same addresses.

    A copy in another memory format, as of a transposed tensor, is none: a later `view` may be legal for the copy only.
    """
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    source, value = node.args[0].meta.get("val"), node.meta.get("val")
    if node.target in DROPOUTS:
        return is_off(node)
    if not isinstance(source, Tensor) or not isinstance(value, Tensor):
        return node.target in ALIASES
    if node.target in ALIASES | CASTS:
        if source.dtype != value.dtype or source.device != value.device:
            return False
        memories = {memory_of(node.args[0]), memory_of(node)}
        return len(memories) == 1 or (_same_strides(source, value) and not memories & written)
    if node.target is aten.slice.Tensor:
        start = node.args[2] if len(node.args) > 2 else 0
        end = node.args[3] if len(node.args) > 3 else None
        step = node.args[4] if len(node.args) > 4 else 1
        whole = end is None or (isinstance(end, int) and end >= _WHOLE)
        return start in (0, None) and whole and step == 1
    return False


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same strides; symbols are compared as expressions, without a guard."""
    return [str(stride) for stride in a.stride()] == [str(stride) for stride in b.stride()]


def _decompose_baddbmm(program: Program) -> None:
    """`beta c + alpha a @ b` in one node (scores with a bias) is its product, its factors and its sum."""
    for node in program.graph.find_nodes(op="call_function", target=aten.baddbmm.default):
        total, *factors = node.args
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        product = program.insert(aten.bmm.default, factors, before=node)
        if alpha != 1:
            product = program.insert(aten.mul.Tensor, (product, alpha), before=node)
        if beta != 0:  # with 0 the sum omits c, even if it holds NaN
            total = total if beta == 1 else program.insert(aten.mul.Tensor, (total, beta), before=node)
            product = program.insert(aten.add.Tensor, (product, total), before=node)
        node.replace_all_uses_with(product)
        program.graph.erase_node(node)


def _products_to_linear(program: Program) -> None:
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = node.args
        elif node.target in (aten.mm.default, aten.matmul.default):
            (x, weight), bias = node.args, None
        else:
            continue
        stored = _stored_as(program, weight)
        if stored is None or len(stored.meta["val"].shape) != 2:
            continue
        name = program.weight_name(stored)
        assert name is not None
        if stored is weight:  # [K, N]
            if len(stored.users) > 1 or program.aliases.get(name):
                continue  # another consumer reads it as [K, N]
            program.weights[name] = program.weights[name].t()
            program.transposed.add(name)
            with program.fake_mode:
                stored.meta["val"] = stored.meta["val"].t()
        linear_args = (x, stored) if bias is None else (x, stored, bias)
        with program.graph.inserting_before(node):
            linear = program.graph.call_function(LINEAR, linear_args)
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        program.graph.erase_node(node)


def _computed_biases_to_sums(program: Program) -> None:
    """`linear(x, W, f(b))` is `linear(x, W) + f(b)`: what changes the rows of W changes those of a stored bias only."""
    for node in program.graph.find_nodes(op="call_function", target=LINEAR):
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if bias is None or program.weight_name(bias) is not None:
            continue
        node.args, node.kwargs = node.args[:2], {}
        total = program.insert(aten.add.Tensor, (node, bias), after=node)
        node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)


def _stored_as(program: Program, weight: Any) -> fx.Node | None:
    """The weight placeholder behind a [K, N] operand, straight or through one transpose."""
    if program.weight_name(weight) is not None:
        return weight
    if not isinstance(weight, fx.Node) or weight.target not in TRANSPOSES:
        return None
    source = weight.args[0]
    if program.weight_name(source) is None:
        return None
    order = weight.args[1:]
    if weight.target is aten.permute.default:
        swaps = [d % 2 for d in order[0]] == [1, 0]
    elif weight.target is aten.transpose.int:
        swaps = order[0] % 2 != order[1] % 2
    else:
        swaps = True
    return source if swaps else None
