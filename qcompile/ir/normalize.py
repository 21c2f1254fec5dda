"""One form for one meaning: what capture does before any pass looks.

no-ops       same-dtype casts, aliases, dropout in evaluation, metadata asserts, whole slices go away
x += y       becomes x + y where nothing else reads the memory of x
baddbmm      becomes its product, its factors and its sum
products     with a 2-D weight become aten.linear(x, W [N, K], bias)
tied weights a tensor with several attribute paths gets one placeholder; `Program.aliases` keeps the others
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from qcompile.ir.aten_ops import ALIASES, CASTS, DROPOUTS, LINEAR, SPLITS, TRANSPOSES, aten, reads_elements
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program

_WHOLE = 2**62  # slices up to here or more reach the end of the dimension


def normalize(program: Program) -> Program:
    """Bring a freshly captured program to the form that passes expect; in place."""
    _inline_grad_scopes(program)
    _merge_tied(program)
    _functional_adds(program)  # first, while a copy that is a no-op otherwise is still there
    _drop_noops(program)
    _decompose_baddbmm(program)
    _products_to_linear(program)
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
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or key not in first:
            first.setdefault(key, node)
            continue
        owner = first[key]
        program.aliases.setdefault(owner.meta[WEIGHT], []).append(name)
        node.replace_all_uses_with(owner)


def _functional_adds(program: Program) -> None:
    """`x += y` is `x + y` if the memory of x is read by nothing else."""
    for node in program.graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        if _owns_memory(node):
            node.target = aten.add.Tensor


def _owns_memory(inplace: fx.Node) -> bool:
    """Whether the value that a node changes in place, and what it is a view of, have no other consumer."""
    node, consumer = inplace.args[0], inplace
    memory = _storage(node)
    while memory is not None and node.op == "call_function":  # else it is of the caller, or a weight
        others = [user for user in node.users if user is not consumer and reads_elements(user, node)]
        if node.target in SPLITS:  # whose parts do not overlap
            others = [user for user in others if user.args[1] == consumer.args[1]]
        if others:
            return False
        source = next((n for n in node.all_input_nodes if _storage(n) == memory), None)
        if source is None:
            return True
        node, consumer = source, node
    return False


def _storage(node: fx.Node) -> int | None:
    """An identity of the memory that a value, or a list of values, lies in; None for anything but tensors."""
    while node.target in DROPOUTS and _is_noop(node):  # gives its input in evaluation, which fake tensors do not
        node = node.args[0]
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _drop_noops(program: Program) -> None:
    graph = program.graph
    for node in reversed(list(graph.nodes)):  # what comes later first: then the users of a `contiguous` are real ones
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _is_noop(node):
            if node.target is aten.contiguous.default:  # a view of it may need a copy again
                for user in node.users:
                    user.target = aten.reshape.default if user.target is aten.view.default else user.target
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_noop(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    source, value = node.args[0].meta.get("val"), node.meta.get("val")
    if node.target in ALIASES:
        return True
    if node.target in DROPOUTS:  # args: input, p, train
        return len(node.args) > 2 and node.args[2] is False
    if not isinstance(source, Tensor) or not isinstance(value, Tensor):
        return False
    if node.target in CASTS:
        return source.dtype == value.dtype and source.device == value.device
    if node.target is aten.slice.Tensor:
        start = node.args[2] if len(node.args) > 2 else 0
        end = node.args[3] if len(node.args) > 3 else None
        step = node.args[4] if len(node.args) > 4 else 1
        whole = end is None or (isinstance(end, int) and end >= _WHOLE)
        return start in (0, None) and whole and step == 1
    return False


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


def _stored_as(program: Program, weight: Any) -> fx.Node | None:
    """The weight placeholder behind a [K, N] operand, straight or through one transpose."""
    if program.weight_name(weight) is not None:
        return weight
    if not isinstance(weight, fx.Node) or weight.target not in TRANSPOSES:
        return None
    source = weight.args[0]
    if program.weight_name(source) is None or len(source.meta["val"].shape) != 2:
        return None
    order = weight.args[1:]
    if weight.target is aten.permute.default:
        swaps = [d % 2 for d in order[0]] == [1, 0]
    elif weight.target is aten.transpose.int:
        swaps = order[0] % 2 != order[1] % 2
    else:
        swaps = True
    return source if swaps else None
