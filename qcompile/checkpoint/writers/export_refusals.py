"""What no served format can say of a model: refused before work, with the place, the value and the fix."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.module_entries import describe
from qcompile.ir.quantized_stacks import STACK_SUFFIX
from qcompile.modules.generation_hooks import hooks_of
from qcompile.modules.kv_constants import SCALES
from qcompile.modules.quant_experts import QuantStack, float_class
from qcompile.modules.quant_linear import QuantLinear
from qcompile.modules.static_quant import StaticQuantConv, StaticQuantLinear
from qcompile.modules.training_module import refuse_training


class ExportError(CheckpointError):
    """A model that a format cannot say; the text names the place, the value and the fix."""


def refuse(target: str, place: str, what: str, fix: str) -> NoReturn:
    """Raise ExportError: `target` cannot say `what` of `place`."""
    raise ExportError(f"{place}: {what}, which {target} cannot say. Fix: {fix}")


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears of a model by path, in its order; one that stands in two places has two paths."""
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if isinstance(module, QuantLinear)}


def check_modules(model: nn.Module, target: str) -> None:
    """Refuse modules and caches of ours that no served format has.

    Args:
        model: quantized.
        target: the format, for messages.

    Raises:
        ExportError: with the first such module.
    """
    try:
        refuse_training(model, "qcompile.export")
    except ValueError as error:
        raise ExportError(str(error)) from None
    hooks = hooks_of(model)
    if hooks.prefix is not None:
        refuse(target, "the model", "the float keys and values of a prefix (IntactKV)", "quantize without IntactKV")
    served = target == "compressed-tensors" and hooks.config is not None and hooks.config.fp8
    if hooks.config is not None and not hooks.config.optional and not served:
        fix = "quantize without QuantizeKV, or for vLLM with QuantizeKV(8, static=True, fp8='tensor')"
        refuse(target, "the model", f"a {hooks.config.bits}-bit key/value cache of ours", fix)
    for path, module in model.named_modules():
        if isinstance(module, QuantStack) and target != "compressed-tensors":
            stack = path.removesuffix(STACK_SUFFIX)
            refuse(target, stack, "a quantized stack of experts", f"keep it float, Rule({stack!r}, keep=True)")
        if isinstance(module, StaticQuantLinear | StaticQuantConv):
            fix = "quantize with scales of each token"
            refuse(target, path, f"a {type(module).__name__} of fixed-point training", fix)
        entry = describe(module)
        if entry is not None and entry["kind"] == "RotatedLinear":
            refuse(target, path, "an online Hadamard transform of its input", "quantize without OnlineHadamard")
        if isinstance(module, QuantLinear):
            if module.signs is not None:
                refuse(target, path, "an online Hadamard transform of its input", "quantize without OnlineHadamard")
            if module.low_in is not None:
                refuse(target, path, "a low-rank correction (LoRC)", "quantize without LoRC, in smaller groups")
    if not quantized_linears(model) and not any(isinstance(module, QuantStack) for module in model.modules()):
        raise ExportError(
            f"no linear of {type(model).__name__} is quantized, so there is nothing for {target} to say. "
            "Fix: give a recipe, as recipe='serve-w4a16'"
        )


def check_class(model: Any, target: str) -> None:
    """Refuse a model that its own class, built anew from its config, is not: what others build and fill.

    Exact rewriting may have changed the architecture (a LayerNorm that became an RMSNorm, a bias that was folded into a
    linear without one).

    Args:
        model: quantized.
        target: the format, for messages.

    Raises:
        ExportError: with the first module or tensors that differ.
    """
    require_transformers(model)
    with torch.device("meta"):
        built: nn.Module = type(model)(copy.deepcopy(model.config))
    quantized = quantized_linears(model)
    ours = dict(model.named_modules(remove_duplicate=False))
    for path, other in built.named_modules(remove_duplicate=False):
        mine = ours.get(path)
        if path in quantized:
            if not isinstance(other, nn.Linear) or type(other).forward is not nn.Linear.forward:
                what = f"codes for a {type(other).__name__}, which is no plain Linear"
                refuse(target, path, what, f"keep it float, Rule('{path}.*', keep=True)")
        elif mine is None or float_class(mine) is not type(other):
            fix = "quantize without the pass that replaced it (FoldNorm of a norm with a mean)"
            refuse(target, path, f"a {type(mine).__name__} in the place of a {type(other).__name__}", fix)
    stacks = {path for path, module in ours.items() if isinstance(module, QuantStack)}
    names = {name for name in model.state_dict() if name.rpartition(".")[0] not in {*quantized, *stacks, SCALES}}
    names |= {f"{path}.weight" for path in quantized} | {path.removesuffix(STACK_SUFFIX) for path in stacks}
    names |= {f"{path}.bias" for path, linear in quantized.items() if linear.bias is not None}
    expected = set(built.state_dict())
    if names != expected:
        more, less = sorted(names - expected)[:3], sorted(expected - names)[:3]
        refuse(
            target, "the model", f"other tensors than those of its class (new {more}, missing {less})",
            "quantize without the pass that added them (a rotation or smoothing that folds biases)",
        )  # fmt: skip
    head = model.get_output_embeddings()
    if isinstance(head, QuantLinear) and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        refuse(
            target, "the logits", "codes of their own where config.json ties them to the embeddings",
            "keep them float: lm_head.* with Rule(.., keep=True)",
        )  # fmt: skip


def require_transformers(model: Any) -> None:
    """Refuse a model that is none of transformers, whose classes servers build. Raises ExportError."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ExportError(f"{error}. Fix: pip install 'torch-qcompile[serve]'") from error
    if not isinstance(model, transformers.PreTrainedModel):
        name = type(model).__name__
        raise ExportError(
            f"{name} is no model of transformers, whose classes servers know. Fix: qcompile.save(model, folder)"
        )


def exact_scale(place: str, scale: Tensor, dtype: torch.dtype, target: str, fix: str) -> Tensor:
    """A scale in another dtype, of the same values.

    Raises:
        ExportError: the dtype does not hold them.
    """
    stored = scale.to(dtype)
    if not torch.equal(stored.double(), scale.double()):
        label = str(dtype).removeprefix("torch.")
        refuse(target, place, f"scales that are no values of {label}", fix)
    return stored
