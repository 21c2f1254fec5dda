"""`package(model, "model.pt2")`: a compiled model in one file, which opens without compiling."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qcompile.api.example_inputs import call_of, trace_batches
from qcompile.api.model_checks import check_model
from qcompile.api.model_example import own_example
from qcompile.api.model_wrappers import inner_model
from qcompile.api.packaged_module import describe_call
from qcompile.backend.ahead_of_time import CompiledGraph, compile_ahead
from qcompile.backend.options import Options
from qcompile.backend.package_archive import is_package, write_archive
from qcompile.codegen.cpu.native_kernels import load_native_kernels, start_loading_native_kernels
from qcompile.ir.call_tree import CallTree, tensors_of
from qcompile.ir.capture import output_as_captured
from qcompile.memory.atomic_file import check_writable
from qcompile.modules.cache_argument import returned_cache
from qcompile.modules.generation_hooks import hooks_of
from qcompile.modules.training_module import refuse_training
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError

if TYPE_CHECKING:
    from qcompile.backend.cached_graph import CachedGraph


def package(
    model: nn.Module,
    path: str | Path,
    recipe: str | Recipe | dict[str, object] | None = None,
    *,
    tokenizer: Any = None,
    example: Any = None,
    **options: Any,
) -> Report:
    """Compile a model ahead of time and write it to one file.

    A causal LM of transformers becomes two graphs, for a prompt and for a decoded token, which read one copy of the
    weights; `load_package` gives it back with `generate()`. Any other module becomes one graph. The file has our
    operators too: it runs without Python and without a compiler, on processors with the instructions of this one.

    Args:
        model: on the CPU, in evaluation mode; float, or quantized by `qcompile.quantize`. It is not changed.
        path: the file to write, which ends in .pt2; an older one is replaced when the new one is whole.
        recipe: for a float model, as the backend's option: one that needs no data; default "int8".
        tokenizer: of transformers, to put into the file.
        example: what to trace another module with, a tensor, tuple or dict; given for a causal LM, its one forward is
            packaged, and it generates no text. Sizes of the first two dimensions stay dynamic where the model allows.
        options: further options of the backend, as in `torch.compile(options=..)`. `rows` decides for both graphs of a
            causal LM which sites stay float; default: 1, a decoded token.

    Returns:
        What was quantized, by which kernels; `metrics["package bytes"]` is the size of the file.

    Raises:
        RecipeError: bad options, a recipe that needs data, a model that cannot be packaged, with the reason.
        ValueError: the path cannot be written, or does not end in .pt2.
        CaptureError: the model cannot be traced with this example.
        CppCompileError: there is no C++ compiler. Nothing is written in any of these cases.
    """
    target = Path(path)
    if not is_package(target) or target.is_dir():
        raise ValueError(f"{path} is no name for a package. Fix: name a file that ends in .pt2")
    check_writable(target)
    checked = Options.read({**options, **({} if recipe is None else {"recipe": recipe})})
    model = inner_model(model)
    _check_cache(model)
    check_model(model)
    refuse_training(model, "qcompile.package")
    _check_place(model)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        if example is None and _generates(model):
            return _package_text(model, target, tokenizer, checked)
        return _package_module(model, target, tokenizer, example, checked)


def _check_cache(model: nn.Module) -> None:
    if any(hooks.config is not None or hooks.prefix is not None for hooks in map(hooks_of, model.modules())):
        raise RecipeError(
            f"{type(model).__name__} has a quantized key/value cache, or a prefix that stays float, and a package has "
            "neither. Fix: quantize the float model with a recipe that leaves the cache as it is"
        )


def _check_place(model: nn.Module) -> None:
    others = sorted({t.device.type for t in (*model.parameters(), *model.buffers())} - {"cpu"})
    if others:
        raise RecipeError(f"the weights are on {', '.join(others)}; packages are for CPUs. Fix: model.to('cpu')")
    if model.training:
        raise RecipeError("the model is in training mode. Fix: model.eval()")


def _generates(model: nn.Module) -> bool:
    """Whether a model is a causal LM of transformers."""
    can = getattr(model, "can_generate", None)
    return can is not None and bool(can()) and not getattr(model.config, "is_encoder_decoder", False)


def _package_text(model: nn.Module, path: Path, tokenizer: Any, options: Options) -> Report:
    obstacle = _obstacle(model)
    if obstacle is not None:
        raise RecipeError(
            f"{type(model).__name__} cannot be packaged to generate text: {obstacle}. Fix: give example=, which "
            "packages its forward alone"
        )
    from qcompile.backend.cached_graph import capture_prompt, capture_step

    start_loading_native_kernels()
    options = dataclasses.replace(options, rows=options.rows or 1)
    prompt, _, _ = _compile_cached(capture_prompt(model), options)
    step, report, cache = _compile_cached(capture_step(model), options)
    graphs, description = {"prompt": prompt, "step": step}, {"kind": "text", **cache}
    files = _files_of(model.config, model.generation_config, tokenizer)
    report.metrics["package bytes"] = write_archive(path, graphs, files, description)
    return report


def _compile_cached(graph: CachedGraph, options: Options) -> tuple[CompiledGraph, Report, dict[str, str]]:
    """Quantize, lower and compile a graph; with what its library says of the cache: heads and width of each part."""
    from qcompile.backend.dynamo import compile_program  # imports Dynamo, which takes a second

    lowered, report = compile_program(graph.program, graph.inputs, options)
    cache = {
        "cache": " ".join(f"{part.shape[1]} {part.shape[3]}" for part in graph.buffers),
        "cache_dtype": str(graph.buffers[0].dtype).removeprefix("torch."),
    }
    settings = {**options.inductor, "aot_inductor.metadata": cache}
    return compile_ahead(lowered, settings), report, cache


def _obstacle(model: nn.Module) -> str | None:
    """Why a causal LM's cache cannot be read by a step; None if it can."""
    from qcompile.generation.growing_cache import obstacle_to_growing

    cache = returned_cache(model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True))
    if not hasattr(cache, "layers"):
        return "it returns no cache of keys and values"
    return obstacle_to_growing(cache)


def _package_module(model: nn.Module, path: Path, tokenizer: Any, example: Any, options: Options) -> Report:
    from qcompile.backend.dynamo import compile_program

    batch = own_example(model) if example is None else example
    call = CallTree.of(*call_of(batch, model, "the example"), model)
    start_loading_native_kernels()
    program, (inputs,) = trace_batches(model, [batch], ["the example"])
    output = output_as_captured(model, call)
    if len(tensors_of(output)) != len(program.outputs):
        raise RecipeError(f"{type(model).__name__} gives other tensors when it is traced. Fix: give another example")
    lowered, report = compile_program(program, inputs, options)
    load_native_kernels()
    description = {"kind": "module", **describe_call(model, call, program, output)}
    graphs = {"module": compile_ahead(lowered, options.inductor)}
    files = _files_of(getattr(model, "config", None), tokenizer)
    report.metrics["package bytes"] = write_archive(path, graphs, files, description)
    return report


def _files_of(*parts: Any) -> dict[str, bytes]:
    """What configs and a tokenizer of transformers write, by name."""
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
