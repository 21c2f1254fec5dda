"""`export_onnx(model, folder)`: quantize a copy if there is a recipe, and write an ONNX folder for CPU runtimes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from qcompile.api.quantize import quantize
from qcompile.checkpoint.atomic_folder import atomic_folder
from qcompile.codegen.onnx.onnx_options import OnnxKeywords, OnnxOptions
from qcompile.codegen.onnx.sentence_embedding import check_example
from qcompile.modules.generation_hooks import detached, refuse_cache
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.modules.static_quant import StaticQuantConv
from qcompile.modules.training_module import refuse_training
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError


def export_onnx(
    model: nn.Module,
    folder: str | Path,
    recipe: str | Recipe | dict[str, object] | None = None,
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Unpack[OnnxKeywords],
) -> Report:
    """Write `folder` with model.onnx, its weights, the tokenizer and a report.

    Args:
        model: float or already quantized; not changed.
        folder: must not exist, or be empty.
        recipe: quantize a copy first; None exports the model as it is.
        batches: calibration data for the recipe.
        example: inputs to trace an encoder with, or a decoder without its cache; None: the model is a causal LM whose
            cache of keys and values the file takes and returns.
        tokenizer: saved beside the model, so that `qcompile generate FOLDER` can run.
        progress: show progress bars and a spinner.
        options: what kind of file: accuracy_level, low_memory, last_logits, chunk, contrib_ops, float_cache,
            float_embeddings, pooling, normalize. Each is described, with its default, in
            qcompile.codegen.onnx.onnx_options.OnnxOptions.

    Raises:
        TypeError: an unknown option.
        ValueError: a bad recipe or option, a site without an ONNX form, a folder that is not empty, or an exported
            model whose output differs from the module's. Nothing is written then.
    """
    file = OnnxOptions.of(options)
    refuse_training(model, "qcompile.export_onnx")
    if example is not None:
        file.check_encoder()
    try:
        from qcompile.codegen.onnx.export_module import export_module
        from qcompile.codegen.onnx.fusions.attention.int8_kv_cache import Int8KVCache
        from qcompile.codegen.onnx.tracing.decoder_cache import cache_layers
        from qcompile.codegen.onnx.tracing.onnx_support import check_supported
        from qcompile.generation.onnx_session import PREFIX_FILE
    except ModuleNotFoundError as error:
        raise RecipeError(f"{error}. Fix: pip install 'torch-qcompile[onnx]'") from error

    if file.pooling is not None:
        check_example(model, example)
    chosen = None if recipe is None else find_recipe(recipe, model, data=batches is not None)
    is_encoder = example is not None
    if not file.float_cache:
        refuse_cache(model, chosen, contrib_ops=file.contrib_ops, encoder=is_encoder)
    if not is_encoder:  # what has no cache of keys and values is refused before it is quantized
        check_supported(model, file.contrib_ops)
        with torch.compiler.set_stance("force_eager"), detached(model):
            cache_layers(model)

    with torch.compiler.set_stance("force_eager"), atomic_folder(folder) as work:
        report = Report("as it is")
        if chosen is not None:
            model = copy.deepcopy(model)
            report = quantize(model, chosen, batches, example=example, progress=progress)
        elif not any(isinstance(m, QuantLinear | QuantStack | StaticQuantConv) for m in model.modules()):
            report = Report("float")
        with detached(model) as calls:
            cache = None
            is_float = file.float_cache or not file.contrib_ops or is_encoder
            if calls.config is not None and calls.scales is not None and not is_float:
                cache = Int8KVCache(calls.scales, calls.config.optional)
            with Console(stderr=True, quiet=not progress).status("exporting and comparing"):
                done = export_module(model, work, file, example=example, tokenizer=tokenizer, cache=cache)
        if calls.prefix is not None:
            save_file(calls.prefix.state_dict(), str(work / PREFIX_FILE))
        if calls.scales is not None and is_float:
            done.rewritten.skip("cache", "stays float32, as requested, or as files of this kind have it")
        report.passes.append(done.rewritten)
        report.metrics["onnx relative error"] = done.error
        report.metrics["onnx relative error as run"] = done.error_as_run
        report.write(work / "qcompile.json")
    return report
