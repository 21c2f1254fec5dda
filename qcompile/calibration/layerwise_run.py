"""A layerwise run: all calibration batches through a program together, stopping before chosen nodes.

Sequential algorithms quantize a site with the inputs that the already quantized part of the model
gives it. A layerwise run computes every batch up to a node, lets the caller rewrite what comes next
(insert nodes, replace weights), and goes on. Each node runs once for each batch. Between stops only
the values that are still to be read are kept: at a site of a decoder that is the residual stream and
the site's input, never a whole model's activations. Passes read rows of values by `rows_of`, which omits padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from qcompile.analysis.sites import find_sites
from qcompile.calibration.padding import BatchTokens, TokenMask
from qcompile.calibration.token_blocks import token_blocks
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program
from qcompile.memory.spilled_weights import SpillFolder
from qcompile.memory.stored_tensor import StoredTensor, loaded


@dataclass(frozen=True)
class RunState:
    """Where a layerwise run stands, by the names of nodes.

    Attributes:
        done: the nodes that were computed.
        values: "<batch>.<node>", or "fixed.<node>" -> what is still to be read.
        sizes: the same, of values that are int.
    """

    done: list[str]
    values: dict[str, Tensor]
    sizes: dict[str, int]


class LayerwiseRun:
    """Values of every batch, up to the node where the run stopped.

    Attributes:
        program: what runs; its graph may be rewritten behind that node.
        done: the nodes that were computed.
        fixed: values that no input reaches, computed once for all batches.
        values: for each batch, the values that are still to be read.
        tokens: for each batch, which rows of values are tokens.
        blocks: how many batches each block has whose tokens are multiplied together.
        kept: nodes whose values stay until they are released, even if nothing is to read them.
    """

    def __init__(
        self,
        program: Program,
        batches: Iterable[Sequence[Any]],
        observed: Iterable[fx.Node] | None = None,
        blocks: Sequence[int] | None = None,
        offload: SpillFolder | None = None,
    ) -> None:
        """Start before the first node.

        Args:
            program: what runs.
            batches: flat inputs of the program.
            observed: nodes whose rows are asked for; None: the inputs of sites.
            blocks: how many batches each block has; None: as token_blocks.py says.
            offload: where the values of batches go that are not being computed with; None: they stay in memory.

        Raises:
            ValueError: a batch with the wrong number of inputs.
            CalibrationError: a batch without a token.
        """
        self.program = program
        self.done: set[fx.Node] = set(program.placeholders)
        self.fixed: dict[fx.Node, Any] = {}
        self.values: list[dict[fx.Node, Any]] = []
        self.tokens: list[BatchTokens] = []
        self.kept: set[fx.Node] = set()
        self._loaded: dict[fx.Node, Tensor] = {}
        self._offload = offload
        self._mask = TokenMask(program)
        data = list(batches)
        self.blocks = token_blocks(data) if blocks is None else list(blocks)
        for batch in data:
            bound = program.bind(batch)
            inputs = zip(program.placeholders, bound, strict=True)
            self.values.append({n: v for n, v in inputs if WEIGHT not in n.meta})
            self.tokens.append(self._mask.of(batch, len(self.values)))
        padded = any(tokens.has_padding for tokens in self.tokens)
        if padded and observed is None:
            observed = [site.input for site in find_sites(program)]
        self._indices = self._mask.indices(observed or ()) if padded else set()

    def advance(self, stop: fx.Node) -> None:
        """Compute what stands before `stop` in the graph, for every batch."""
        ahead: list[fx.Node] = []
        for node in self.program.graph.nodes:
            if node is stop:
                break
            if node not in self.done and node.op != "placeholder":
                ahead.append(node)
        self.done.update(ahead)
        fixed: dict[fx.Node, None] = {}
        for node in ahead:
            if all(self._is_fixed(a) or a in fixed for a in node.all_input_nodes):
                fixed[node] = None
        moving = [n for n in ahead if n not in fixed]
        if len(self.values) > 1:
            self._load(moving)
        with torch.no_grad():
            for node in fixed:
                self.fixed[node] = self._compute(node, {})
            for values, tokens in zip(self.values, self.tokens, strict=True):
                if moving:
                    values.update(loaded(values))
                for node in moving:
                    values[node] = self._compute(node, values)
                    if node in self._indices:
                        tokens.indices[node] = values[node]
                    for used in node.all_input_nodes:
                        if used in values and used not in self.kept and not self._is_read(used, node):
                            del values[used]
                if self._offload is not None:
                    values.update(tree_map_only(Tensor, self._offload.spill, values))
        self._loaded.clear()
        for node in [n for n in self.fixed if n not in self.kept and all(u in self.done for u in n.users)]:
            del self.fixed[node]

    def release(self, node: fx.Node) -> None:
        """Keep a node's values no longer than the program reads them."""
        self.kept.discard(node)
        if all(user in self.done for user in node.users):
            for values in (self.fixed, *self.values):
                values.pop(node, None)

    def state(self) -> RunState | None:
        """Where the run stands; None if it holds a value that is neither a tensor nor an int, or rows by index."""
        if any(tokens.indices for tokens in self.tokens):
            return None
        named = {f"fixed.{node.name}": value for node, value in self.fixed.items()}
        for batch, values in enumerate(self.values):
            named |= {f"{batch}.{node.name}": value for node, value in values.items()}
        if not all(isinstance(value, (Tensor, int)) for value in named.values()):
            return None
        return RunState(
            [node.name for node in self.done],
            {name: value for name, value in named.items() if isinstance(value, Tensor)},
            {name: value for name, value in named.items() if isinstance(value, int)},
        )

    def restore(self, state: RunState) -> None:
        """Go to where another run of the same program and batches stood; the graph may be rewritten behind that.

        Args:
            state: of that run.

        Raises:
            KeyError: it is of another program.
        """
        nodes = {node.name: node for node in self.program.graph.nodes}
        self.done = {nodes[name] for name in state.done}
        self.fixed, self.values = {}, [{} for _ in self.values]
        for name, value in {**state.values, **state.sizes}.items():
            place, _, label = name.partition(".")
            node, holder = nodes[label], self.fixed if place == "fixed" else self.values[int(place)]
            holder[node] = value.to(node.meta["val"].device) if isinstance(value, Tensor) else value

    def _load(self, nodes: list[fx.Node]) -> None:
        """Read the weights of some nodes that lie in files, once for all batches."""
        for operand in {a for node in nodes for a in node.all_input_nodes if WEIGHT in a.meta}:
            weight = self.program.weight_of(operand)
            if isinstance(weight, StoredTensor):
                self._loaded[operand] = weight.read()

    def finish(self, index: int, changed: fx.Node, value: Any) -> Any:
        """The outputs of one batch if the node where the run stopped had another value.

        The run stays where it is.

        Args:
            index: of the batch.
            changed: the node where the run stopped.
            value: its value.

        Returns:
            What the program returns.
        """
        values = {**self.fixed, **loaded(self.values[index]), changed: value}
        last: dict[fx.Node, fx.Node] = {}
        ahead = [n for n in self.program.graph.nodes if n not in self.done and n is not changed]
        for node in ahead:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        with torch.no_grad():
            for node in ahead:
                if node.op == "output":
                    return fx.node.map_arg(node.args[0], lambda n: values[n])
                if node.op != "placeholder":
                    values[node] = self._compute(node, values)
                    for used in [n for n in node.all_input_nodes if last[n] is node]:
                        values.pop(used, None)
        raise AssertionError("a graph ends in its output")

    def values_of(self, node: fx.Node) -> Iterator[Tensor]:
        """The value of a computed node, batch by batch. Raises KeyError for one that is not kept any more."""
        for values in self.values:
            yield self.fixed[node] if node in self.fixed else loaded(values[node])

    def rows_of(self, node: fx.Node) -> Iterator[Tensor]:
        """The rows [R, K] of a computed node's value [.., K] that are tokens, batch by batch. Raises KeyError."""
        for tokens, value in zip(self.tokens, self.values_of(node), strict=True):
            yield tokens.rows(node, value)

    def tokens_along(self, node: fx.Node) -> Iterator[Tensor | None]:
        """Which rows of a computed node's value [.., K] are tokens, [..], batch by batch; None where all are."""
        for tokens, value in zip(self.tokens, self.values_of(node), strict=True):
            yield tokens.along(node, value)

    def notes(self) -> list[str]:
        """What the report of a pass must say of padding."""
        return self._mask.notes()

    def _is_fixed(self, node: fx.Node) -> bool:
        return WEIGHT in node.meta or node in self.fixed or node.op == "get_attr"

    def _is_read(self, node: fx.Node, now: fx.Node) -> bool:
        """Whether a value is needed after the node that is being computed."""
        return any(user is not now and (user not in self.done or now < user) for user in node.users)

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        def value_of(operand: fx.Node) -> Any:
            if WEIGHT in operand.meta:
                return self._loaded[operand] if operand in self._loaded else self.program.weight_of(operand)
            return values[operand] if operand in values else self.fixed[operand]

        return self.program.evaluate(node, value_of)
