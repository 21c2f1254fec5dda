"""Where the results of a Program go in the module that it was captured from, checked before anything is written."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.analysis.facts import Facts
from qcompile.ir.aten_ops import CASTS, LINEAR, VIEWS, aten
from qcompile.ir.node_meta import LOW_RANK, REPLACES_LAYER_NORM, SITE
from qcompile.ir.op_calls import HadamardCall, QExpertsCall, QLinearCall, QuantizeCall
from qcompile.ir.program import Program
from qcompile.modules.quant_experts import QuantStack, replace_parameter
from qcompile.modules.quant_linear import BUFFERS, QuantLinear, RotatedLinear
from qcompile.recipe.rule import RecipeError

# Weights that passes add and that no module of the model holds.
_OF_GRAPH = {*BUFFERS, "rotation", "center", "key_scale", "value_scale"} - {"bias"}


@dataclass
class WriteBack:
    """The modules that the results of a Program are written into.

    Attributes:
        model: what the Program was captured from.
        owners: site name -> path of the plain linear that holds its weight.
        not_plain: site name -> why no module can be replaced.
    """

    model: nn.Module
    owners: dict[str, str]
    not_plain: dict[str, str]

    @staticmethod
    def of(model: nn.Module, facts: Facts) -> WriteBack:
        """Find the module of every linear site.

        Args:
            model: a module.
            facts: of the Program that was captured from it.
        """
        owners: dict[str, str] = {}
        not_plain: dict[str, str] = {}
        program = facts.program
        for site in facts.sites:
            if site.kind != "linear":
                continue
            bias = program.weight_name(site.bias)
            for name in (site.name, *program.aliases.get(site.name, [])):
                path = name.rpartition(".")[0]
                if _is_plain_linear(model.get_submodule(path), program, site.name, bias):
                    owners[site.name] = path
                    break
            else:
                not_plain[site.name] = (
                    "no module computes just this product, so nothing can take its place; "
                    "torch.compile(model, backend='qcompile') quantizes it"
                )
        return WriteBack(model, owners, not_plain)

    def check(self, after: Program) -> None:
        """Refuse what cannot be written back, before anything is written.

        Args:
            after: the Program that passes rewrote.

        Raises:
            RecipeError: an online transform, or a norm, that no module of the model can hold.
        """
        homeless = [
            node.name
            for node, _ in HadamardCall.find(after)
            for user in node.users
            if not self._has_module(after, self._linear_behind(user))
        ]
        if homeless:
            raise RecipeError(
                f"the online transforms {homeless} have no linear module to live in. Fix: drop OnlineHadamard"
            )
        for node in after.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
            gain = node.meta.get(REPLACES_LAYER_NORM)
            if gain is not None and not isinstance(self.model.get_submodule(gain.rpartition(".")[0]), nn.LayerNorm):
                raise RecipeError(
                    f"the LayerNorm with gain {gain} is no nn.LayerNorm module. Fix: use FoldNorm(center=False)"
                )

    def apply(self, before: Program, after: Program) -> None:
        """Write weights, norms and linears into the model.

        Args:
            before: the Program as captured.
            after: the Program that passes rewrote and `check` accepted.
        """
        for name, tensor in after.weights.items():
            parent, _, leaf = name.rpartition(".")
            if before.weights.get(name) is tensor or leaf in _OF_GRAPH:
                continue
            stored = tensor.t().contiguous() if name in after.transposed else tensor
            module = self.model.get_submodule(parent)
            old = getattr(module, leaf, None)
            if isinstance(old, nn.Parameter) or name not in before.weights:
                setattr(module, leaf, nn.Parameter(stored, requires_grad=False))
            else:
                setattr(module, leaf, stored)
        untied = any(name in after.weights for others in before.aliases.values() for name in others)
        config = getattr(self.model, "config", None)
        if untied and config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # or saving would tie them again
        for node in after.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
            if node.meta.get(REPLACES_LAYER_NORM):
                path = node.meta[REPLACES_LAYER_NORM].rpartition(".")[0]
                old = self.model.get_submodule(path)
                norm = nn.RMSNorm(node.args[1], eps=node.args[3], dtype=old.weight.dtype)
                self.model.set_submodule(path, norm.requires_grad_(False).eval())
        for node, call in QLinearCall.find(after):
            self.model.set_submodule(self._path(node.meta[SITE]), _quant_linear(after, node, call))
        for node, _ in QExpertsCall.find(after):
            replace_parameter(self.model, node.meta[SITE], QuantStack.of(after, node, before))
        for node in after.graph.find_nodes(op="call_function", target=LINEAR):
            signs = _signs(after, node.args[0])
            if signs is not None:
                path = self._path(str(after.weight_name(node.args[1])))
                self.model.set_submodule(path, RotatedLinear(self.model.get_submodule(path), signs))

    def _path(self, site: str) -> str:
        return self.owners.get(site, site.rpartition(".")[0])

    def _has_module(self, after: Program, linear: fx.Node | None) -> bool:
        """Whether a module can take the place of a float linear; quantized ones were checked before."""
        if linear is None or linear.target is not LINEAR:
            return linear is not None
        return after.weight_name(linear.args[1]) not in self.not_plain

    def _linear_behind(self, node: fx.Node) -> fx.Node | None:
        while node.target not in (QLinearCall.target, LINEAR):
            if not _only_carries(node) or not node.users:
                return None
            node = next(iter(node.users))
        return node


def _only_carries(node: fx.Node) -> bool:
    """Whether a node between a transform and its linear is one that QuantLinear redoes by itself."""
    return QuantizeCall.matches(node) or node.target is operator.getitem or node.target in VIEWS | CASTS


def _is_plain_linear(module: nn.Module, program: Program, weight: str, bias: str | None) -> bool:
    """Whether calling the module is x W^T + b and nothing else, found by calling it."""
    if list(module.children()):
        return False
    matrix = program.weights[weight]
    x = torch.randn(2, matrix.shape[1], device=matrix.device).to(matrix.dtype)
    shift = program.weights[bias] if bias else None
    try:
        with torch.no_grad():
            result = module(x)
    except Exception:  # any failure means that it is something else: the site is then skipped, with a reason
        return False
    product = torch.nn.functional.linear(x, matrix, shift)
    if not isinstance(result, Tensor) or result.shape != product.shape:
        return False
    return torch.allclose(result, product, rtol=1e-2, atol=1e-2)


def _signs(program: Program, x: Any) -> Tensor | None:
    while isinstance(x, fx.Node):
        if HadamardCall.matches(x):
            return program.weight_of(HadamardCall.of(x).signs)
        if not _only_carries(x):
            return None
        x = x.args[0]
    return None


def _quant_linear(program: Program, node: fx.Node, call: QLinearCall) -> QuantLinear:
    parts = dict(zip(("codes", "scale", "zero", "group_scale", "bias"), (*call.stored, call.bias), strict=True))
    tensors = {name: None if part is None else program.weight_of(part) for name, part in parts.items()}
    tensors["signs"] = _signs(program, call.x)
    tensors |= {part: program.weights[weight] for part, weight in (node.meta.get(LOW_RANK) or {}).items()}
    rows = program.weight_of(call.weight).shape[0]
    return QuantLinear(call.columns, rows, call.weight_format, call.act_format, tensors)
