"""What is written into a model after the passes: all of it made first, then written without anything that can fail."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.api.training_writes import BUILDERS
from qcompile.ir.aten_ops import CASTS, LINEAR, VIEWS, aten
from qcompile.ir.node_meta import LOW_RANK, MODULE, REPLACES_LAYER_NORM, SITE
from qcompile.ir.op_calls import HadamardCall, QExpertsCall, QLinearCall, QuantizeCall
from qcompile.ir.program import Program
from qcompile.modules.fixed_point_modules import FIXED_POINT_PARTS
from qcompile.modules.low_rank_linear import STATE
from qcompile.modules.quant_experts import QuantStack, replace_parameter
from qcompile.modules.quant_linear import BUFFERS, QuantLinear, RotatedLinear
from qcompile.modules.take_place import take_place
from qcompile.modules.tied_names import forget_broken_ties, named_ties
from qcompile.recipe.rule import RecipeError

# Weights that passes add and that no module of the model holds.
_OF_GRAPH = {
    *BUFFERS, "rotation", "center", "key_scale", "value_scale", "lora_a", "lora_b", *STATE, "low", *FIXED_POINT_PARTS,
} - {"bias"}  # fmt: skip


@dataclass
class ModuleWrites:
    """New tensors and modules, by the paths of those that they replace.

    Attributes:
        model: changed by `apply` only.
        tensors: attribute path -> parameter, or tensor of a buffer.
        modules: path of a module -> what takes its place.
        rotations: path of a linear that stays float -> the signs of the transform in front of it.
        stacks: the attribute paths of a stack of experts, and its codes.
    """

    model: nn.Module
    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    rotations: dict[str, Tensor] = field(default_factory=dict)
    stacks: list[tuple[list[str], QuantStack]] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module, before: Program, after: Program) -> ModuleWrites:
        """Make everything.

        Args:
            model: not changed.
            before: the Program as captured.
            after: the Program that passes rewrote.

        Raises:
            RecipeError: a result that no module of the model can hold.
        """
        writes = ModuleWrites(model)
        biases = writes._take_linears(before, after)
        writes._take_training(after)
        writes._take_norms(after)
        writes._take_tensors(before, after, biases)
        visited = set[str]()
        for node, _ in QExpertsCall.find(after):
            name = node.meta.get(SITE)
            if name is not None and name not in visited:
                visited.add(name)
                names = [name, *before.aliases.get(name, [])]
                writes.stacks.append((names, QuantStack.of(after, node, before)))
        return writes

    def apply(self) -> None:
        """Write all of it into the model."""
        ties = named_ties(self.model)
        for name, tensor in self.tensors.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, tensor)
        replaced = [(self.model.get_submodule(path), new) for path, new in self.modules.items()]
        for old, new in replaced:
            take_place(self.model, old, new)
        for path, signs in self.rotations.items():
            inner = self.model.get_submodule(path)
            take_place(self.model, inner, RotatedLinear(inner, signs))
        for names, stack in self.stacks:
            for name in names:
                replace_parameter(self.model, name, stack)
        forget_broken_ties(self.model, ties)

    def _take_training(self, after: Program) -> None:
        """A module that is called more than once is trained as one, whatever its calls are."""
        for node in after.graph.nodes:
            path = node.meta.get(MODULE)
            if node.target in BUILDERS and path is not None and path not in self.modules:
                self.modules[path] = BUILDERS[node.target](after, node, self.model.get_submodule(path))

    def _take_tensors(self, before: Program, after: Program, biases: set[str]) -> None:
        """Weights that passes changed; what is tied to one by another path gets the same tensor."""
        known = {*before.weights, *biases}.union(*before.aliases.values())
        for name, tensor in after.weights.items():
            parent, _, leaf = name.rpartition(".")
            if before.weights.get(name) is tensor or (leaf in _OF_GRAPH and name not in before.weights):
                continue
            if name not in known:
                raise RecipeError(f"no module of the model can hold {name}. Fix: drop the pass that adds it")
            module = self.model.get_submodule(parent)
            stored = tensor.t().contiguous() if name in after.transposed else tensor
            old = getattr(module, leaf, None)
            if isinstance(old, nn.Parameter) or name not in before.weights:
                stored = nn.Parameter(stored, requires_grad=False)
            for path in (name, *after.aliases.get(name, [])):
                self.tensors[path] = stored

    def _take_norms(self, after: Program) -> None:
        for node in after.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
            gain = node.meta.get(REPLACES_LAYER_NORM)
            if gain is None:
                continue
            path = gain.rpartition(".")[0]
            old = self.model.get_submodule(path)
            if not isinstance(old, nn.LayerNorm) or type(old).forward is not nn.LayerNorm.forward:
                raise RecipeError(
                    f"the LayerNorm with gain {gain} is no nn.LayerNorm module. Fix: use FoldNorm(center=False)"
                )
            norm = nn.RMSNorm(node.args[1], eps=node.args[3], dtype=old.weight.dtype, device=old.weight.device)
            self.modules[path] = norm.requires_grad_(False)

    def _take_linears(self, before: Program, after: Program) -> set[str]:
        """A module that is called more than once is one module: all its calls must have become the same.

        Returns:
            The biases that passes added and that modules will hold.
        """
        biases = set[str]()
        of_path: dict[str, QuantLinear | Tensor | None] = {}
        for node in after.graph.nodes:
            path = node.meta.get(MODULE)
            if path is None or node.op != "call_function" or node.target not in (LINEAR, QLinearCall.target):
                continue
            signs = _signs(after, node.args[0])
            bias = after.weight_name(node.args[2]) if node.target is LINEAR and len(node.args) > 2 else None
            if bias is not None and bias not in before.weights:
                biases.add(bias)
                self._hold_bias(path, after.weight_of(node.args[1]), after.weights[bias])
            new = _quant_linear(after, node, signs) if node.target is not LINEAR else signs
            if path not in of_path:
                of_path[path] = new
            elif not _same(of_path[path], new):
                raise RecipeError(
                    f"the calls of {path} were rewritten differently, and they are one module. "
                    f"Fix: keep it float by a rule, Rule('{path}.*', keep=True)"
                )
        for path, new in of_path.items():
            if isinstance(new, QuantLinear):
                self.modules[path] = new
            elif new is not None:
                self.rotations[path] = new.clone()
        return biases | {name for _, call in QLinearCall.find(after) if (name := after.weight_name(call.bias))}

    def _hold_bias(self, path: str, weight: Tensor, bias: Tensor) -> None:
        """A linear of another class than nn.Linear need not read a bias that it came without."""
        old = self.model.get_submodule(path)
        if type(old).forward is not nn.Linear.forward or "forward" in vars(old):
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
            self.modules[path] = linear


def is_captured(node: fx.Node) -> bool:
    """Whether a call is of the model as it came: of one that was quantized before, not of a pass."""
    return "nn_module_stack" in node.meta


def only_carries(node: fx.Node) -> bool:
    """Whether a node between a transform and its linear is one that QuantLinear redoes by itself."""
    return QuantizeCall.matches(node) or node.target is operator.getitem or node.target in VIEWS | CASTS


def _signs(program: Program, x: Any) -> Tensor | None:
    """The signs of the transform that a pass put in front of a linear."""
    while isinstance(x, fx.Node):
        if HadamardCall.matches(x):
            return None if is_captured(x) else program.weight_of(HadamardCall.of(x).signs)
        if not only_carries(x):
            return None
        x = x.args[0]
    return None


def _quant_linear(program: Program, node: fx.Node, signs: Tensor | None) -> QuantLinear:
    call = QLinearCall.of(node)
    parts = dict(zip(("codes", "scale", "zero", "group_scale", "bias"), (*call.stored, call.bias), strict=True))
    tensors = {name: None if part is None else program.weight_of(part) for name, part in parts.items()}
    tensors["signs"] = None if signs is None else signs.clone()  # a checkpoint has one for each module
    tensors |= {part: program.weights[weight] for part, weight in (node.meta.get(LOW_RANK) or {}).items()}
    rows = program.weight_of(call.weight).shape[0]
    return QuantLinear(call.columns, rows, call.weight_format, call.act_format, tensors)


def _same(a: QuantLinear | Tensor | None, b: QuantLinear | Tensor | None) -> bool:
    """Whether two calls would get the same module."""
    if isinstance(a, QuantLinear) and isinstance(b, QuantLinear):
        return (a.format, a.act) == (b.format, b.act) and all(
            _same(a._buffers[name], b._buffers[name]) for name in BUFFERS
        )
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return a is None and b is None
