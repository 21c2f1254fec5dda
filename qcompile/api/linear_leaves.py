"""The linear modules of a model that cannot be one graph, side by side in one Program without what lies between them.

Control flow that depends on data has no whole graph, but every linear module has one of its own. What passes read off
the surroundings of a site, whether it chooses experts or gives the output, comes from one call of the model in which
every value is followed. Passes that need more than single sites are dropped, and the report names them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile.ir.call_tree import CallTree, tensors_of
from qcompile.ir.capture import capture
from qcompile.ir.in_place import storage_identity
from qcompile.ir.linear_modules import modules_with_hooks
from qcompile.ir.program import Program
from qcompile.ir.trace_failure import CaptureError
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.registry import Stage, registered
from qcompile.recipe.report import PassReport, SiteReport

_PRODUCTS = ("mm", "scaled_dot_product", "convolution", "linear")
_CHOICES = ("topk", "argmax")


def without_whole_graph(recipe: Recipe, failure: CaptureError) -> tuple[Recipe, list[PassReport]]:
    """The passes of a recipe that rewrite site by site, and a report on each of the others.

    Args:
        recipe: what was requested.
        failure: why there is no whole graph.

    Raises:
        CaptureError: a pass collects data of the whole graph, and cannot be dropped.
    """
    if recipe.needs:
        who = ", ".join(recipe.needs)
        raise CaptureError(f"{failure} Or use a recipe without calibration: {recipe.name!r} needs one graph for {who}")
    kept = tuple(c for c in recipe.passes if registered()[type(c)].stage >= Stage.ACTIVATIONS)
    reports = []
    for config in recipe.passes:
        if config not in kept:
            reports.append(PassReport(type(config).__name__))
            reports[-1].skip("the model", f"this pass needs one graph: {failure}")
    if not kept:
        raise failure
    return dataclasses.replace(recipe, passes=kept), reports


def capture_leaves(model: nn.Module, call: CallTree, failure: CaptureError) -> tuple[Program, list[SiteReport]]:
    """The Program of a model's linear modules.

    Args:
        model: in evaluation mode.
        call: an example.
        failure: why there is no whole graph.

    Returns:
        The Program, and a report on each linear module that is not in it.

    Raises:
        CaptureError: the example calls no linear module; it is `failure`.
    """
    flow = _Flow(model)
    with torch.no_grad(), flow:
        flow.finish(tensors_of(model(*call.args, **call.kwargs)))
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    leaves: list[_Leaf] = []
    skipped: list[SiteReport] = []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if path and isinstance(weight, nn.Parameter) and weight.ndim == 2 and not list(module.children()):
            if module in flow.inputs:
                leaves.append(_Leaf(module, flow.inputs[module], module in flow.choices, module in flow.heads))
            elif isinstance(module, nn.Linear) and not _is_called(module, parents, flow.called):
                leaves.append(_Leaf(module, torch.zeros(2, weight.shape[1], dtype=weight.dtype, device=weight.device)))
            elif isinstance(module, nn.Linear):
                n, k = weight.shape
                reason = "the example does not call it. Fix: give one that does"
                size = weight.nbytes
                skipped.append(SiteReport(f"{path}.weight", n, k, reason=reason, bytes_before=size, bytes_after=size))
    if not leaves:
        raise failure
    together = _SideBySide(model, leaves)
    return capture(together, [leaf.x for leaf in leaves], dynamic=False), skipped


def _is_called(module: nn.Module, parents: dict[int, nn.Module], called: set[nn.Module]) -> bool:
    """Whether a module that was not called lies straight in one that was, which may read its weight."""
    parent = parents[id(module)]
    while isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
        parent = parents[id(parent)]
    return parent in called


@dataclasses.dataclass(frozen=True)
class _Leaf:
    module: nn.Module
    x: Tensor
    chooses: bool = False
    is_head: bool = False


class _SideBySide(nn.Module):
    """Calls leaves of a model by themselves; its modules and parameters are the model's own, by the same paths."""

    def __init__(self, model: nn.Module, leaves: list[_Leaf]) -> None:
        super().__init__()
        self.training = model.training
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self.leaves = leaves

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        results = []
        for leaf, x in zip(self.leaves, inputs, strict=True):
            y = leaf.module(x)
            if leaf.chooses:
                results.append(y.topk(1)[0])
            elif leaf.is_head:
                results.append(y)
            else:
                results.append(torch.matmul(y.mT, y))  # a further product, as whatever reads it in the model
        return results


class _Flow(TorchDispatchMode):
    """Follows the results of linear modules through one call of a model.

    Attributes:
        inputs: module with one tensor in and one out -> zeros like what it was called with.
        choices: modules whose result chooses among its own channels.
        heads: modules whose result reaches the output and no further product.
        called: all modules that were called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: dict[nn.Module, Tensor] = {}
        self.choices: set[nn.Module] = set()
        self.heads: set[nn.Module] = set()
        self.called: set[nn.Module] = set()
        self._multiplied: set[nn.Module] = set()
        self._widths: dict[nn.Module, int] = {}
        # Holds tensors, so that no memory is used for another one.
        self._origins: dict[int, tuple[Tensor, frozenset[nn.Module]]] = {}
        self._modules = modules_with_hooks(model)
        self._remove: list[Callable[[], None]] = []

    def __enter__(self) -> Any:
        for module in self._modules:
            self._remove.append(module.register_forward_hook(self._note, with_kwargs=True).remove)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for remove in self._remove:
            remove()
        self._origins.clear()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.called.add(module)
        given = [*args, *kwargs.values()]
        x = given[0] if len(given) == 1 else None
        if not isinstance(x, Tensor) or not isinstance(result, Tensor) or not x.is_floating_point():
            return
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and x.shape[:-1] == result.shape[:-1]:
            rows = [2] * max(1, x.ndim - 1)
            self.inputs[module] = torch.zeros(*rows, x.shape[-1], dtype=x.dtype, device=x.device)
            self._widths[module] = result.shape[-1]
            self._origins[storage_identity(result)] = (result, frozenset({module}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        read = tensors_of([args, kwargs or {}])
        origins = frozenset[nn.Module]().union(*[self._of(tensor) for tensor in read])
        if not origins:
            return out
        if any(part in name for part in _PRODUCTS):
            self._multiplied |= origins
            return out
        if any(part in name for part in _CHOICES):
            self.choices |= {m for m in self._of(read[0]) if self._widths[m] == read[0].shape[-1]}
        for tensor in tensors_of(out):
            self._origins[storage_identity(tensor)] = (tensor, self._of(tensor) | origins)
        return out

    def _of(self, tensor: Tensor) -> frozenset[nn.Module]:
        return self._origins.get(storage_identity(tensor), (tensor, frozenset[nn.Module]()))[1]

    def finish(self, outputs: list[Tensor]) -> None:
        """Find the heads, from what the model gives."""
        reaching = frozenset[nn.Module]().union(*[self._of(tensor) for tensor in outputs])
        self.heads = set(reaching - self._multiplied)
