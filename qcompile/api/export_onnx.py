"""`export_onnx(model, folder)`: quantize a copy if asked, and write an ONNX folder for CPU runtimes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from qcompile.api.quantize import quantize
from qcompile.modules.generation_hooks import detached, refuse_cache
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.pipeline.presets import find_recipe
from qcompile.recipe.recipe import Recipe, RecipeError
from qcompile.recipe.report import Report


def export_onnx(
    model: nn.Module,
    folder: str | Path,
    recipe: str | Recipe | dict[str, object] | None = None,
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    tokenizer: Any = None,
    accuracy_level: int = 4,
    low_memory: bool = False,
    last_logits: bool = False,
    chunk: int | None = None,
    portable: bool = False,
    float_cache: bool = False,
    float_embeddings: bool = False,
    pooling: str | None = None,
    normalize: bool = False,
    progress: bool = True,
) -> Report:
    """Write `folder` with model.onnx, its weights, the tokenizer and a report.

    Args:
        model: float or already quantized; left as it is.
        folder: must not exist, or be empty. recipe: quantize a copy first; None exports as it is.
        batches: calibration data for the recipe. example: inputs to trace an encoder with.
        tokenizer: saved beside the model, so that `qcompile generate FOLDER` can run.
        accuracy_level: how MatMulNBits multiplies: 4 rounds activations to int8 in blocks, as ONNX Runtime's
            tools do by default; 1 keeps float32 and is slower. A portable file does not say it: its runtime decides.
        low_memory: W4A8 products only by their 4-bit codes. Otherwise more than four tokens are multiplied in int8,
            which reads a prompt faster (docs/onnx.md), and an open session holds the weights in 4 and in 8 bits.
        last_logits: a decoder's file gives the logits of the last token only: enough to generate, and a prompt is
            read faster; perplexity cannot be measured on it.
        chunk: how many tokens of a prompt onnxruntime-genai reads at once (its search.chunk_size): long prompts take
            less memory and somewhat more time, and a batch of prompts longer than that is an error there.
        portable: operators of the ONNX standard only (opset 21), for other runtimes than ONNX Runtime. Their cache
            is float32.
        float_cache: a cache in float32, whatever the recipe says: for tools that hand over no other, as optimum.
        float_embeddings: of a quantized model: tables of embeddings stay float32. Otherwise large ones that no product
            shares are held in 8 bits, in blocks of at most 128.
        pooling: of an encoder: "mean", "cls" or "last" token's embedding as the output `sentence_embedding`, and a
            folder that sentence-transformers loads. normalize: to norm 1. progress: show bars and a spinner.

    Raises:
        ValueError: bad recipe, a site without an ONNX form, a folder that is not empty, or an
            exported model whose output differs from the module's. Nothing is then left behind.
    """
    try:
        from qcompile.codegen.onnx.export_module import OnnxOptions, export_module
        from qcompile.codegen.onnx.fusions.attention.int8_kv_cache import CodedCache
        from qcompile.codegen.onnx.sentence_embedding import Pooling, check_example
        from qcompile.generation.onnx_session import PREFIX_FILE
    except ModuleNotFoundError as error:
        raise RecipeError("ONNX export needs: pip install 'torch-qcompile[onnx]'") from error
    from qcompile.checkpoint.atomic_folder import atomic_folder

    if accuracy_level not in (1, 4):
        raise RecipeError(f"accuracy_level {accuracy_level} is unknown: 1 multiplies in float32, 4 in int8")
    if portable and accuracy_level == 1:
        raise RecipeError(
            "accuracy_level 1 cannot be written into a portable file: leave it out, and set ONNX Runtime's "
            "session.qdq_matmulnbits_accuracy_level to 1 where the file is opened"
        )
    if normalize and pooling is None:
        raise RecipeError("normalize is about the sentence's embedding: give pooling='mean', 'cls' or 'last' too")
    config = None if pooling is None else Pooling(pooling, normalize)
    if config is not None:
        check_example(model, example)
    if last_logits and example is not None:
        raise RecipeError("last_logits is for decoders: an encoder (example=..) has no last token")
    if chunk is not None and (chunk < 1 or example is not None):
        raise RecipeError(f"chunk is a number of tokens of a decoder's prompt, 1 or more, got {chunk}")
    chosen = None if recipe is None else find_recipe(recipe, model, data=batches is not None)
    if not float_cache:
        refuse_cache(model, chosen, portable=portable, encoder=example is not None)

    with atomic_folder(folder) as work:
        report = Report("as it is")
        if chosen is not None:
            model = copy.deepcopy(model)
            report = quantize(model, chosen, batches, example=example, progress=progress)
        elif not any(isinstance(m, QuantLinear | QuantStack) for m in model.modules()):
            report = Report("float")
        with detached(model) as calls:
            layout = OnnxOptions(accuracy_level, low_memory, last_logits, chunk, portable, float_embeddings, config)
            cache = None
            is_float = float_cache or portable or example is not None
            if calls.config is not None and calls.scales is not None and not is_float:
                cache = CodedCache(calls.scales, calls.config.optional)
            with Console(stderr=True, quiet=not progress).status("exporting and comparing"):
                done = export_module(model, work, layout, example=example, tokenizer=tokenizer, cache=cache)
        if calls.prefix is not None:
            save_file(calls.prefix.state_dict(), str(work / PREFIX_FILE))
        if calls.scales is not None and is_float:
            done.rewritten.skip("cache", "stays float32, as asked for, or as files of this kind have it")
        report.passes.append(done.rewritten)
        report.numbers["onnx relative error"] = done.error
        report.numbers["onnx relative error as run"] = done.as_run
        report.write(work / "qcompile.json")
    return report
