"""Commands that make something: a quantized model, an ONNX folder, text, the demonstration."""

from __future__ import annotations

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
    console,
    load,
    load_encoder,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the plot and the JSON")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option(help="fewer tokens and rounds")] = False,
) -> None:
    """Rewrite, quantize, compile, export and measure the embedded LLM; ends in one screen and a plot."""
    from qcompile.cli.demo import run

    run(out, console, quick=quick)


@app.command()
def quantize(
    model: Model, folder: Out, recipe: RecipeName = "int8", text: TextFile = None, dtype: Dtype = "float32"
) -> None:
    """Quantize MODEL and write it to FOLDER (safetensors and JSON)."""
    from qcompile.api.quantize import quantize as run
    from qcompile.checkpoint.atomic_folder import refuse_full
    from qcompile.checkpoint.save_load import save as write

    refuse_full(folder)
    loaded, tokenizer = load(model, dtype)
    report = run(loaded, recipe, calibration_batches(recipe, tokenizer, text))
    write(loaded, folder, tokenizer)
    console.print(str(report), highlight=False)
    console.print(f"written to {folder}")


@app.command("export-onnx")
def export_onnx(
    model: Model,
    folder: Out,
    recipe: RecipeName = "int4-cpu",
    text: TextFile = None,
    accuracy_level: Annotated[
        int, typer.Option(help="of int4 products: 4 rounds activations to int8 in blocks, 1 keeps float32, slower")
    ] = 4,
    low_memory: Annotated[
        bool, typer.Option(help="W4A8 products by 4-bit codes only: long prompts slower, half the memory")
    ] = False,
    last_logits: Annotated[
        bool, typer.Option(help="only the last token's logits: prompts faster, no `qcompile eval` of the folder")
    ] = False,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="tokens of a prompt that onnxruntime-genai reads at once: less memory, slower; no batch above"
        ),
    ] = None,
    portable: Annotated[
        bool, typer.Option(help="operators of the ONNX standard only: for other runtimes; slower in ONNX Runtime")
    ] = False,
    float_cache: Annotated[
        bool, typer.Option(help="a float32 cache whatever the recipe says: for optimum; slower behind long texts")
    ] = False,
    float_embeddings: Annotated[
        bool, typer.Option(help="tables of embeddings in float32; else large ones that no product shares in 8 bits")
    ] = False,
    pooling: Annotated[
        str | None, typer.Option(help="MODEL is an encoder: mean, cls or last token as output sentence_embedding")
    ] = None,
    normalize: Annotated[bool, typer.Option(help="with --pooling: embeddings of norm 1")] = False,
) -> None:
    """Quantize MODEL and write an ONNX folder, checked against PyTorch before it appears.

    The folder runs as it is in onnxruntime-genai, and by `qcompile generate FOLDER`; an encoder's (--pooling) in
    sentence-transformers with backend="onnx".
    """
    from qcompile.api.export_onnx import export_onnx as write
    from qcompile.calibration.text import sentence_batches, sentences
    from qcompile.checkpoint.atomic_folder import refuse_full

    refuse_full(folder)
    loaded, tokenizer = load(model) if pooling is None else load_encoder(model)
    if pooling is None:
        example, batches = None, calibration_batches(recipe, tokenizer, text)
    else:
        batches = sentence_batches(tokenizer, sentences(text))
        example = batches[0]
    report = write(
        loaded,
        folder,
        recipe,
        batches,
        example=example,
        tokenizer=tokenizer,
        accuracy_level=accuracy_level,
        low_memory=low_memory,
        last_logits=last_logits,
        chunk=chunk,
        portable=portable,
        float_cache=float_cache,
        float_embeddings=float_embeddings,
        pooling=pooling,
        normalize=normalize,
    )
    console.print(str(report), highlight=False)
    console.print(f"written to {folder}")
