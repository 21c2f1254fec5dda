"""What a recipe would give to a served format: refused before anything is quantized; and sites that servers fuse."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.api.model_example import own_example
from qcompile.checkpoint.writers.awq_layout import TARGET as AWQ
from qcompile.checkpoint.writers.awq_layout import check_awq
from qcompile.checkpoint.writers.compressed_tensors_layout import TARGET as COMPRESSED_TENSORS
from qcompile.checkpoint.writers.compressed_tensors_layout import scheme_of
from qcompile.checkpoint.writers.expert_linears import stack_columns
from qcompile.checkpoint.writers.export_refusals import ExportError, quantized_linears, refuse
from qcompile.checkpoint.writers.float_tensors import model_dtype
from qcompile.checkpoint.writers.gguf_blocks import TARGET as GGUF
from qcompile.checkpoint.writers.gguf_blocks import block_type
from qcompile.checkpoint.writers.gptq_layout import TARGET as GPTQ
from qcompile.checkpoint.writers.gptq_layout import check_gptq
from qcompile.checkpoint.writers.torchao_weights import TARGET as EXECUTORCH
from qcompile.checkpoint.writers.torchao_weights import check_xnnpack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format, ScaleType
from qcompile.passes import IntactKV, LoRC, OnlineHadamard, PerTensorActivations, Quantize, QuantizeKV
from qcompile.pipeline.served_presets import SERVED_PRESETS
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.recipe import Recipe

_PASSES = {
    OnlineHadamard: "an online Hadamard transform, which is not stored",
    LoRC: "a low-rank correction beside weights",
    IntactKV: "the float keys and values of a prefix",
}


def check_recipe(recipe: Recipe, model: nn.Module, target: str) -> None:
    """Refuse, before any work, passes and formats of a recipe that a served format cannot say.

    Args:
        recipe: to be run.
        model: float.
        target: the format.

    Raises:
        ExportError: with the pass, or with the site and its format.
    """
    for config in recipe.passes:
        for kind, what in _PASSES.items():
            if isinstance(config, kind):
                refuse(target, f"recipe {recipe.name!r}", what, f"drop {kind.__name__}")
        served = target == COMPRESSED_TENSORS and isinstance(config, QuantizeKV) and config.fp8
        if isinstance(config, QuantizeKV) and not config.optional and not served:
            fix = "drop QuantizeKV, or for vLLM use QuantizeKV(8, static=True, fp8='tensor')"
            refuse(target, f"recipe {recipe.name!r}", "a key/value cache of ours", fix)
        if isinstance(config, PerTensorActivations):
            refuse(target, f"recipe {recipe.name!r}", "one scale for all tokens", "drop PerTensorActivations")
    quantizing = [config for config in recipe.passes if isinstance(config, Quantize)]
    if not quantizing:
        raise ExportError(f"recipe {recipe.name!r} quantizes no weights. Fix: use one that does, as serve-w4a16")
    check = CHECKS[target]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rule = next((rule for rule in recipe.rules if rule.matches(f"{path}.weight")), None)
        if rule is not None and rule.keep:
            continue
        config = quantizing[0]
        form, act = config.weight, config.act
        if module is head and config.keep_lm_head and (rule is None or rule.weight is None):
            continue
        if module is head and config.lm_head is not None:
            form, act = config.lm_head, config.lm_head_act
        if config.undivided is not None and not form.fits(module.in_features):
            form = config.undivided
        if rule is not None:
            form, act = rule.weight or form, rule.act or act
        check(path, form, act, module.in_features, model_dtype(model))
    for name, columns in stack_columns(model).items():
        rule = next((rule for rule in recipe.rules if rule.matches(name)), None)
        if rule is None or not rule.keep:
            if target != COMPRESSED_TENSORS:
                refuse(target, name, "a quantized stack of experts", f"keep it float, Rule({name!r}, keep=True)")
            form = (rule and rule.weight) or quantizing[0].weight
            check(name, form, None, columns, model_dtype(model))


def fitted(recipe: Recipe, model: nn.Module) -> Recipe:
    """A served preset with the group size and the scales that fit a model; any other recipe as it is.

    The groups are the largest of 128, 64 and 32 columns that divide every linear, as kernels of servers want; the
    scales have the dtype of a float16 model.

    Args:
        recipe: what was chosen.
        model: float.
    """
    if recipe not in SERVED_PRESETS:
        return recipe
    columns = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    columns += stack_columns(model).values()
    size = next((size for size in (128, 64, 32) if all(k % size == 0 for k in columns)), 128)
    scale: ScaleType = "f16" if model_dtype(model) == torch.float16 else "bf16"

    def fit(config: PassConfig) -> PassConfig:
        if not isinstance(config, Quantize):
            return config
        form = dataclasses.replace(config.weight, group=min(config.weight.group, size))
        if form.scale == "bf16":
            form = dataclasses.replace(form, scale=scale)
        return dataclasses.replace(config, weight=form)

    return dataclasses.replace(recipe, passes=tuple(fit(config) for config in recipe.passes))


def check_siblings(model: Any, target: str) -> None:
    """Refuse linears that read one value in different formats: servers make one layer of q, k and v, of gate and up.

    The values are found by running the model once on its own example, where formats differ at all.

    Raises:
        ExportError: with both sites.
    """
    linears = quantized_linears(model)
    if len({_formats(linear) for linear in linears.values()}) == 1:
        return
    for paths in shared_inputs(model):
        formats = {path: _formats(linears[path]) for path in paths if path in linears}
        first = next(iter(formats), "")
        for path, other in formats.items():
            if formats[first] != other:
                refuse(
                    target, path, f"{_words(other)} beside {_words(formats[first])} of {first}, with which servers "
                    "fuse it", "give both one format, by a rule",
                )  # fmt: skip


def shared_inputs(model: Any) -> list[list[str]]:
    """Paths of linears that read one value, quantized and float ones, where several do."""
    found: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    alive: list[Tensor] = []  # or memory of one value would be used for the next

    def note(path: str, x: Tensor) -> None:
        alive.append(x)
        found[(x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x._version)].append(path)

    example = own_example(model)  # which runs the model too
    handles = [
        module.register_forward_pre_hook(lambda _, args, path=path: note(path, args[0]) if args else None)
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear | nn.Linear)
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**example)
    finally:
        for handle in handles:
            handle.remove()
    return [list(dict.fromkeys(paths)) for paths in found.values() if len(set(paths)) > 1]


def _formats(linear: QuantLinear) -> tuple[str, str]:
    return str(linear.format), str(linear.act or "")


def _words(formats: tuple[str, str]) -> str:
    return formats[0] + (f" with {formats[1]} activations" if formats[1] else "")


def _compressed(path: str, form: Format, act: Format | None, columns: int, dtype: torch.dtype) -> None:
    scheme_of(path, form, act, columns, dtype)


def _gguf(path: str, form: Format, act: Format | None, columns: int, dtype: torch.dtype) -> None:
    block_type(path, form, act, columns)


CHECKS = {COMPRESSED_TENSORS: _compressed, GGUF: _gguf, GPTQ: check_gptq, AWQ: check_awq, EXECUTORCH: check_xnnpack}
"""Format -> what refuses one site: its path, formats of weight and activation, K, dtype of the model."""
