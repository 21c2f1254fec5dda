"""Commands that write a model: quantize, export-onnx."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from qcompile.cli.arguments import (
    Dtype,
    Model,
    Out,
    RecipeName,
    TextFile,
    app,
    calibration_batches,
    flags_of,
    load,
    load_encoder,
)
from qcompile.cli.output import tell
from qcompile.codegen.onnx.onnx_options import OnnxOptions


@app.command()
def quantize(
    model: Model,
    folder: Out,
    recipe: RecipeName = "int8",
    text: TextFile = None,
    dtype: Dtype = "float32",
    dump: Annotated[Path | None, typer.Option(help="folder for the graph before and after every pass")] = None,
) -> None:
    """Quantize MODEL and write it to FOLDER (safetensors and JSON)."""
    from qcompile.api.quantize import quantize as run
    from qcompile.checkpoint.atomic_folder import require_empty
    from qcompile.checkpoint.save_load import save as write

    require_empty(folder)
    loaded, tokenizer = load(model, dtype)
    report = run(loaded, recipe, calibration_batches(recipe, tokenizer, text), dump=dump)
    write(loaded, folder, tokenizer)
    tell(report)
    tell(f"written: {folder}")


@app.command("export-onnx")
@flags_of(OnnxOptions)
def export_onnx(
    model: Model, folder: Out, options: OnnxOptions, recipe: RecipeName = "int4-cpu", text: TextFile = None
) -> None:
    """Quantize MODEL and write an ONNX folder, verified against PyTorch before it appears.

    The folder runs in onnxruntime-genai, and by `qcompile generate FOLDER`.
    The folder of an encoder (--pooling) runs in sentence-transformers.
    """
    from qcompile.api.export_onnx import export_onnx as write
    from qcompile.calibration.text import sentence_batches, sentences
    from qcompile.checkpoint.atomic_folder import require_empty

    require_empty(folder)
    if options.pooling is None:
        loaded, tokenizer = load(model)
        example, batches = None, calibration_batches(recipe, tokenizer, text)
    else:
        options.check_encoder()
        loaded, tokenizer = load_encoder(model)
        batches = sentence_batches(tokenizer, sentences(text))
        example = batches[0]
    flags = dataclasses.asdict(options)
    report = write(loaded, folder, recipe, batches, example=example, tokenizer=tokenizer, **flags)
    tell(report)
    tell(f"written: {folder}")
