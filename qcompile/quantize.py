"""`quantize(model, recipe, batches)`: run a recipe and write its result into the model, in place.

The model is captured once, without its cache; passes run on that Program; only when everything has
succeeded are folded weights written back and linears replaced. Until then the model is as it was,
whatever happens (an error, Ctrl-C).
"""

from __future__ import annotations

import operator
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.attach import attach, fit_cache, make_constants, make_prefix, resolve
from qcompile.attention_flow import products
from qcompile.calibrate import CalibrationError
from qcompile.capture import capture
from qcompile.expert_stack import QuantStack, hold_stack
from qcompile.formats import Format
from qcompile.module import PARTS, QuantLinear, RotatedLinear
from qcompile.pipeline import check_data, run
from qcompile.presets import find_recipe
from qcompile.program import WEIGHT, Program
from qcompile.recipe import Recipe, RecipeError
from qcompile.report import Report
from qcompile.sites import find_sites

# Weights that passes add and that no module of the model holds.
_OF_GRAPH = {*PARTS, "turn", "center", "key_scale", "value_scale"} - {"bias"}

ops = torch.ops.qcompile
aten = torch.ops.aten


def quantize(
    model: nn.Module,
    recipe: str | Recipe | dict[str, object] = "int8",
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    verify: bool = True,
    progress: bool = True,
) -> Report:
    """Quantize a model in place.

    Args:
        model: any module that traces to one graph; its class, `generate`, `state_dict` and device
            moves stay.
        recipe: preset name (`qcompile recipes`), "auto" (see advise.py), Recipe, plain data or path to a JSON file.
        batches: calibration data: dicts of keyword arguments, tuples of arguments, or tensors.
            Needed by recipes with statistics; else only the first is used, to trace and to verify.
        example: what to trace with when there are no batches; transformers' models bring their own.
        verify: certify every exact pass on the first batch.
        progress: show bars.

    Returns:
        What was done, what was left and why.

    Raises:
        ValueError: (as RecipeError, CaptureError, CalibrationError, NothingToQuantize) with the
            place and the mend; the model is then unchanged.
    """
    how = resolve(find_recipe(recipe, model, data=batches is not None), model)
    how.check()
    check_data(how, batches is not None)
    held = list(batches) if batches is not None else None
    if held is not None and not held:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    first = held[0] if held else example if example is not None else _own_example(model)
    args, kwargs = call_of(first)
    was_training = model.training
    model.eval()
    try:
        program = capture(model, *widen_batch(args, kwargs))
        how, heads, left_out = fit_cache(model, how, args, kwargs, len(products(program)))
        plan = _Plan.of(model, program)
        flat = [flat_inputs(program, batch, kwargs) for batch in (held or [first])]
        rewritten, report = run(
            program,
            how,
            batches=(lambda: flat) if held else None,
            example=flat[0],
            verify=verify,
            keep=plan.not_plain,
            progress=progress,
        )
        plan.check(program, rewritten)
        prefix, constants = make_prefix(how, report.made, heads), make_constants(report.made, heads)
    finally:
        model.train(was_training)
    plan.apply(program, rewritten)
    attach(model, how, prefix, constants)
    report.passes += [left_out] if left_out is not None else []
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.qcompile_recipe = how.to_json()
    return report


def _own_example(model: nn.Module) -> Any:
    example = getattr(model, "dummy_inputs", None)
    if not isinstance(example, dict):
        raise RecipeError(
            f"{type(model).__name__} brings no example input to trace with. Mend: "
            "qcompile.quantize(model, recipe, example=<a tensor, tuple or dict of inputs>)"
        )
    return example


def traceable_example(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments to trace a model with that brings its own example. Raises RecipeError."""
    return widen_batch(*call_of(_own_example(model)))


def call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keyword arguments that a calibration batch stands for."""
    if isinstance(batch, Mapping):
        return (), {k: v for k, v in batch.items() if v is not None}
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def widen_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One row would be specialised by the tracer: trace with two."""

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1 else value

    return tuple(twice(a) for a in args), {k: twice(v) for k, v in kwargs.items()}


def flat_inputs(program: Program, batch: Any, first: dict[str, Any]) -> Sequence[Any]:
    """A batch as the flat inputs of a program; `first` gives the order of keywords."""
    args, kwargs = call_of(batch)
    missing = [name for name in first if name not in kwargs]
    if missing:
        raise CalibrationError(f"a batch lacks {missing}, which the first batch has")
    flat = [*args, *[kwargs[name] for name in first]]
    if len(flat) != len(program.inputs):
        raise CalibrationError(f"a batch has {len(flat)} tensors, the model's graph takes {len(program.inputs)}")
    return flat


@dataclass
class _Plan:
    """Where the results of a Program go in the module that it was captured from."""

    model: nn.Module
    owners: dict[str, str]  # site name -> path of the plain linear that holds its weight
    not_plain: dict[str, str]  # site name -> why it cannot be replaced in place

    @staticmethod
    def of(model: nn.Module, program: Program) -> _Plan:
        owners: dict[str, str] = {}
        not_plain: dict[str, str] = {}
        for site in find_sites(program):
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
        return _Plan(model, owners, not_plain)

    def check(self, before: Program, after: Program) -> None:
        """Refuse what cannot be written back, before anything is written."""
        homeless = [
            n.name
            for n in after.graph.find_nodes(op="call_function", target=ops.hadamard.default)
            for user in n.users
            if self._linear_behind(user) is None
        ]
        if homeless:
            raise RecipeError(f"the online transforms {homeless} have no linear module to live in: drop RotateOnline")
        for node in after.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
            gain = node.meta.get("replaces_layer_norm")
            if gain is not None and not isinstance(self.model.get_submodule(gain.rpartition(".")[0]), nn.LayerNorm):
                raise RecipeError(
                    f"the LayerNorm with gain {gain} is no nn.LayerNorm module: use FoldNorm(centre=False)"
                )

    def apply(self, before: Program, after: Program) -> None:
        """Write weights, norms and linears into the model."""
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
        untied = any(n in after.weights for others in before.aliases.values() for n in others)
        config = getattr(self.model, "config", None)
        if untied and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # or saving would tie them again
        for node in after.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
            if node.meta.get("replaces_layer_norm"):
                path = node.meta["replaces_layer_norm"].rpartition(".")[0]
                old = self.model.get_submodule(path)
                norm = nn.RMSNorm(node.args[1], eps=node.args[3], dtype=old.weight.dtype)
                self.model.set_submodule(path, norm.requires_grad_(False).eval())
        for node in after.graph.find_nodes(op="call_function", target=ops.qlinear.default):
            self.model.set_submodule(self._path(node.meta["site"]), _quant_linear(after, node))
        for node in after.graph.find_nodes(op="call_function", target=ops.qexperts.default):
            hold_stack(self.model, node.meta["site"], QuantStack.of(after, node, before))
        for node in after.graph.find_nodes(op="call_function", target=aten.linear.default):
            signs = _signs(after, node.args[0])
            if signs is not None:
                path = self._path(after.weight_name(node.args[1]) or "")
                self.model.set_submodule(path, RotatedLinear(self.model.get_submodule(path), signs))

    def _path(self, site: str) -> str:
        return self.owners.get(site, site.rpartition(".")[0])

    def _linear_behind(self, node: fx.Node) -> fx.Node | None:
        while node.target not in (ops.qlinear.default, aten.linear.default):
            if not _only_carries(node) or not node.users:
                return None
            node = next(iter(node.users))
        return node


_CARRIERS = (
    ops.quantize.default,
    operator.getitem,
    aten.view.default,
    aten.reshape.default,
    aten._to_copy.default,
    aten.to.dtype,
)


def _only_carries(node: fx.Node) -> bool:
    """Whether a node between a transform and its linear is one that QuantLinear redoes by itself."""
    return node.target in _CARRIERS


def _is_plain_linear(module: nn.Module, program: Program, weight: str, bias: str | None) -> bool:
    """Whether calling the module is x W^T + b and nothing else, found by calling it."""
    if list(module.children()):
        return False
    matrix = program.weights[weight]
    x = torch.randn(2, matrix.shape[1], device=matrix.device).to(matrix.dtype)
    shift = program.weights[bias] if bias else None
    try:
        with torch.no_grad():
            got = module(x)
    except Exception:  # any failure means that it is something else: the site is then left, with a reason
        return False
    want = torch.nn.functional.linear(x, matrix, shift)
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-2, atol=1e-2)


def _signs(program: Program, x: Any) -> Tensor | None:
    while isinstance(x, fx.Node):
        if x.target is ops.hadamard.default:
            return program.weights[x.args[1].meta[WEIGHT]]
        if not _only_carries(x):
            return None
        x = x.args[0]
    return None


def _quant_linear(program: Program, node: fx.Node) -> QuantLinear:
    x, _, _, codes, scale, zero, group_scale, bias, form, act, columns, _ = node.args
    parts = {"codes": codes, "scale": scale, "zero": zero, "group_scale": group_scale, "bias": bias}
    tensors = {k: None if v is None else program.weights[v.meta[WEIGHT]] for k, v in parts.items()}
    tensors["signs"] = _signs(program, x)
    tensors |= {part: program.weights[weight] for part, weight in (node.meta.get("low_rank") or {}).items()}
    rows = tensors["codes"].shape[0]
    return QuantLinear(
        int(columns),
        rows,
        Format.parse(str(form)),
        Format.parse(str(act)) if act else None,
        tensors,
    )
