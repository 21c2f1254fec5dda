"""The one intermediate representation: a graph of pre-dispatch ATen and its named weights.

A `Program` is what every pass reads and rewrites and what every target lowers. Weights and inputs
are both placeholders; what tells them apart is `weights`, which maps attribute paths to tensors:

    placeholder  "blocks.0.up.weight"   ->  weights["blocks.0.up.weight"]   [N, K]
    placeholder  input                  ->  the caller's argument

No module class, no layer and no architecture is known here or below.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.ir.node_meta import WEIGHT

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _AllObserved(BaseException):
    """Ends a run whose rest nobody observes; no Exception, which the interpreter would comment on."""


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module whose nodes can be rewritten; tensors and fake values are shared, not copied."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, memo))
    memo[next(iter(module.graph.find_nodes(op="output")))] = next(iter(graph.find_nodes(op="output")))
    for old, new in memo.items():
        new.meta = copy.copy(old.meta)
    # Between passes nobody calls forward: its Python code is written only when somebody does.
    return _LazyGraphModule(module, graph)


@dataclass
class Program:
    """A graph of ATen calls, its weights by attribute path, and what is shared between them.

    Attributes:
        graph_module: every placeholder is a weight or an input; `meta["val"]` of every node is the
            fake value (shape, dtype, symbolic sizes).
        weights: attribute path -> tensor. Linear weights are [N, K] whatever the module stores.
        aliases: attribute path -> the other attribute paths of the same tensor (tied weights).
        transposed: weights that the module stores as [K, N]; `weights` holds their transpose, [N, K].
        cache_pairs: (input index, output index) of state that a caller feeds back unchanged.
        breaks: where the frontend had to split the model, as text.
        scalars: Dynamo inputs that became constants of the graph: index -> value.
        alive: what keeps shared tensors alive (see weight_cache.py).
        version: rises with every change of the graph that goes through this class.
    """

    graph_module: fx.GraphModule
    weights: dict[str, Tensor]
    aliases: dict[str, list[str]] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    cache_pairs: list[tuple[int, int]] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    scalars: dict[int, float] = field(default_factory=dict)
    alive: list[object] = field(default_factory=list)
    version: int = 0

    # -- reading ---------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The torch.fx graph."""
        return self.graph_module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """All placeholders, weights and inputs, in call order."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders that the caller fills, in call order."""
        return [n for n in self.placeholders if WEIGHT not in n.meta]

    @property
    def output_node(self) -> fx.Node:
        """The single output node."""
        return next(iter(self.graph.find_nodes(op="output")))

    @property
    def outputs(self) -> list[Any]:
        """The flat list of returned values (nodes or constants)."""
        returned = self.output_node.args[0]
        return list(returned) if isinstance(returned, (tuple, list)) else [returned]

    def weight_name(self, node: object) -> str | None:
        """The attribute path behind a placeholder, or None for anything else."""
        return node.meta.get(WEIGHT) if isinstance(node, fx.Node) else None

    def weight_of(self, node: object) -> Tensor:
        """The tensor behind a weight's placeholder. Raises KeyError, with the node, for anything else."""
        name = self.weight_name(node)
        if name is None:
            raise KeyError(f"{node} is not the placeholder of a weight")
        return self.weights[name]

    def node_of(self, name: str) -> fx.Node:
        """The placeholder of the weight `name`. Raises KeyError."""
        for node in self.placeholders:
            if node.meta.get(WEIGHT) == name:
                return node
        raise KeyError(f"no weight {name!r} in this program; it has {len(self.weights)} weights")

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The fake mode that the graph's values belong to."""
        for node in self.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None:
                return mode
        raise ValueError("the program holds no tensor value: nothing to compile")

    # -- rewriting -------------------------------------------------------------------------------

    def add_weight(self, name: str, tensor: Tensor) -> fx.Node:
        """Add the placeholder of a new weight; an existing name is an error."""
        if name in self.weights:
            raise ValueError(f"the program already has a weight {name!r}")
        self.version += 1
        last = self.placeholders[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder("w_" + "".join(c if c.isalnum() else "_" for c in name))
        node.meta[WEIGHT] = name
        with self.fake_mode:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        node.meta["val"] = like
        self.weights[name] = tensor.detach()
        return node

    def insert(
        self,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
    ) -> fx.Node:
        """Insert a call next to a node and give it its fake value."""
        self.version += 1
        with self.graph.inserting_before(before) if before else self.graph.inserting_after(after):
            node = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.fake_mode:
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def unpack(self, node: fx.Node, count: int) -> list[fx.Node]:
        """Insert the reading of each output of a node that has `count` of them."""
        parts: list[fx.Node] = []
        for index in range(count):
            parts.append(self.insert(operator.getitem, (node, index), after=parts[-1] if parts else node))
        return parts

    def inline(self, function: Any, args: Sequence[Any], *, before: fx.Node) -> Any:
        """Trace `function(*args)` to ATen and insert its nodes; returns what it returns, as nodes.

        Args:
            function: takes and returns tensors; traced on the fake values of `args`.
            args: nodes, or constants.
            before: where to insert.
        """
        self.version += 1
        nodes = [a for a in args if isinstance(a, fx.Node)]

        def over_nodes(*values: Any) -> Any:
            rest = iter(values)
            return function(*[next(rest) if isinstance(a, fx.Node) else a for a in args])

        trace, mode = make_fx(over_nodes, tracing_mode="real", _allow_non_fake_inputs=True), self.fake_mode
        allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True  # constants of `function` are real
        try:
            with mode, torch.no_grad():
                traced = trace(*[n.meta["val"] for n in nodes])
        finally:
            mode.allow_non_fake_inputs = allowed
        memo: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
        result: Any = None
        with self.graph.inserting_before(before):
            for node in traced.graph.nodes:
                if node.op == "output":
                    result = fx.node.map_arg(node.args[0], lambda n: memo[n])
                elif node.op == "get_attr":
                    name = next(c for i in itertools.count() if not hasattr(self.graph_module, c := f"constant_{i}"))
                    self.graph_module.register_buffer(name, getattr(traced, node.target))  # Inductor takes no other
                    memo[node] = self.graph.get_attr(name)
                    memo[node].meta = dict(node.meta)
                elif node.op != "placeholder":
                    memo[node] = self.graph.node_copy(node, lambda n: memo[n])
        return result

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Send every user of `old` to `new`, except `new` itself."""
        self.version += 1
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def cleanup(self) -> None:
        """Drop dead nodes and the weights that nothing reads any more, then recompile."""
        self.version += 1
        self.graph.eliminate_dead_code()
        for node in self.placeholders:
            if WEIGHT in node.meta and not node.users:
                self.weights.pop(node.meta[WEIGHT], None)
                self.graph.erase_node(node)
        self.graph.lint()
        self.graph_module.recompile()

    def copy(self) -> Program:
        """A program that can be rewritten without touching this one; tensors are shared."""
        return Program(
            copy_graph(self.graph_module),
            self.weights.copy(),
            {name: list(others) for name, others in self.aliases.items()},
            set(self.transposed),
            list(self.cache_pairs),
            list(self.breaks),
            dict(self.scalars),
            list(self.alive),
        )

    def widened(self, dtype: torch.dtype = torch.float64) -> Program:
        """The same program computed in `dtype`: weights, constants and casts alike.

        Certificates run here: rounding of the model's own dtype would hide a broken law.
        """
        wide = self.copy()
        wide.weights = {n: t.to(dtype) if t.dtype in _FLOATS else t for n, t in wide.weights.items()}
        for node in wide.graph.nodes:
            if node.op == "get_attr":
                value = getattr(wide.graph_module, node.target)
                if isinstance(value, Tensor) and value.dtype in _FLOATS:
                    setattr(wide.graph_module, node.target, value.to(dtype))
            elif node.op == "call_function":
                widen = lambda a: dtype if a in _FLOATS else a  # noqa: E731
                node.args = fx.node.map_aggregate(node.args, widen)
                node.kwargs = fx.node.map_aggregate(node.kwargs, widen)
        wide.graph_module.recompile()
        return wide

    # -- running ---------------------------------------------------------------------------------

    def bind(self, inputs: Sequence[Any]) -> list[Any]:
        """Weights and inputs in the order of the placeholders."""
        expected = self.inputs
        if len(inputs) != len(expected):
            names = ", ".join(n.name for n in expected)
            raise ValueError(f"the program takes {len(expected)} inputs ({names}), got {len(inputs)}")
        rest = iter(inputs)
        return [self.weights[n.meta[WEIGHT]] if WEIGHT in n.meta else next(rest) for n in self.placeholders]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run eagerly; returns the flat outputs. Values are freed after their last use."""
        with torch.no_grad():
            result = fx.Interpreter(self.graph_module).run(*self.bind(inputs))
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def watch(self, nodes: Iterable[fx.Node], inputs: Sequence[Any], observe: Callable[[fx.Node, Any], None]) -> None:
        """Run eagerly and call `observe(node, value)` on each of `nodes` as it is computed; stop behind the last."""
        pending = set(nodes)

        class Watcher(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n in pending:
                    observe(n, value)
                    pending.remove(n)
                    if not pending:
                        raise _AllObserved
                return value

        with torch.no_grad(), contextlib.suppress(_AllObserved):
            Watcher(self.graph_module).run(*self.bind(inputs))

    def evaluate(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """The value of a call, a constant or a weight; `value_of` gives those of a call's operands."""
        if node.op == "placeholder":
            return self.weight_of(node)
        if node.op == "get_attr":
            return getattr(self.graph_module, str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        return node.target(*args, **kwargs)
