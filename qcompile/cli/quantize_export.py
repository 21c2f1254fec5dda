"""Commands that write a model: quantize, package, export-onnx."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from qcompile.calibration.ranks import Ranks
from qcompile.cli.arguments import (
    DataSource,
    Dtype,
    Model,
    Out,
    RecipeName,
    ReportFile,
    TextFile,
    app,
    calibration_batches,
    check_recipes,
    flags_of,
    is_read_in_parts,
    load,
    load_encoder,
)
from qcompile.cli.interruption import kept, said_finished
from qcompile.cli.output import console, tell, write_report
from qcompile.cli.path_checks import output_package, require_space, weight_bits, work_folder
from qcompile.cli.quantize_gguf import SUFFIX, output_model, quantize_file
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.pipeline.find_recipe import find_recipe

Dump = Annotated[
    Path | None,
    typer.Option(help="folder for the graph before and after every pass", parser=work_folder, metavar="FOLDER"),
]


OutModel = Annotated[
    Path,
    typer.Argument(
        help="folder to write; must not exist, or be empty. A .gguf file, where MODEL is one",
        metavar="FOLDER",
        parser=output_model,
    ),
]


@app.command()
def quantize(
    model: Model,
    folder: OutModel,
    recipe: RecipeName = "int8",
    text: TextFile = None,
    data: DataSource = None,
    dtype: Dtype = "float32",
    dump: Dump = None,
    report_file: ReportFile = None,
    memory: Annotated[
        str | None,
        typer.Option(help="what a run may take; of a MODEL in safetensors or GGUF files", metavar="12GB"),
    ] = None,
    device: Annotated[
        str, typer.Option(help="where computing is done, as cuda; weights go there when they are read")
    ] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with FOLDER.unfinished, which a run that was killed left")
    ] = False,
) -> None:
    """Quantize MODEL and write it to FOLDER (safetensors and JSON), or to a GGUF file if MODEL is one.

    A folder of safetensors files, or a GGUF file, is read in parts, and may be larger than memory.
    """
    from qcompile.api.device_placement import known_device, move_to_device
    from qcompile.api.quantize import quantize as run
    from qcompile.api.quantize_folder import quantize_folder as run_in_parts
    from qcompile.checkpoint.save_load import save as write
    from qcompile.checkpoint.tensor_file import size_in_bytes

    stream = is_read_in_parts(model)
    for flag in [name for name, given in (("--resume", resume), ("--memory", memory)) if given and not stream]:
        raise ValueError(f"{flag} goes with safetensors or GGUF files, and {model} is in none. Fix: drop it")
    known_device(device)
    limit = None if memory is None else size_in_bytes(memory, "--memory")
    if folder.suffix == SUFFIX:
        run_of = {"device": device, "memory": limit, "resume": resume, "dump": dump}
        report = quantize_file(model, folder, recipe, text, data, **run_of)
        if Ranks.joined().is_first:
            write_report(report_file, f"{model}, quantized by {recipe}", report=report)
        return
    check_recipes(recipe)
    with kept(lambda: f"{folder} was not written{said_finished(folder)}"):
        loaded, tokenizer = load(model, dtype, any_class=True, stream=stream)
        move_to_device(loaded, device)
        _require_space(folder, loaded, recipe, text or data)
        batches = calibration_batches(recipe, loaded, tokenizer, text, data)
        if stream:
            report = run_in_parts(
                model,
                folder,
                recipe,
                batches,
                model=loaded,
                tokenizer=tokenizer,
                device=device,
                memory=limit,
                resume=resume,
                dump=dump,
            )
        else:
            report = run(loaded, recipe, batches, dump=dump)
            write(loaded, folder, tokenizer)
    if not Ranks.joined().is_first:
        return
    tell(report)
    tell(f"written: {folder}")
    write_report(report_file, f"{model}, quantized by {recipe}", report=report)


@app.command()
def package(
    model: Model,
    file: Annotated[
        Path, typer.Argument(help="file to write, which ends in .pt2", parser=output_package, metavar="FILE")
    ],
    recipe: RecipeName = "int8",
    text: TextFile = None,
    data: DataSource = None,
    dtype: Dtype = "bfloat16",
) -> None:
    """Quantize and compile MODEL, a causal LM, and write it to one file that opens without compiling.

    It runs by `qcompile generate FILE`, and from C++. A MODEL that is quantized already stays as it is.
    """
    from qcompile.api.package_model import package as write
    from qcompile.api.quantize import quantize as run

    check_recipes(recipe)
    with kept(lambda: f"{file} was not written"):
        loaded, tokenizer = load(model, dtype)
        if getattr(loaded, "qcompile_recipe", None) is None:
            tell(run(loaded, recipe, calibration_batches(recipe, loaded, tokenizer, text, data)))
        with console.status("compiling"):
            report = write(loaded, file, tokenizer=tokenizer)
    tell(f"written: {file}  ({report.metrics['package bytes'] / 1e6:.0f} MB)")


@app.command("export-onnx")
@flags_of(OnnxOptions)
def export_onnx(
    model: Model,
    folder: Out,
    options: OnnxOptions,
    recipe: RecipeName = "int4-cpu",
    text: TextFile = None,
    data: DataSource = None,
) -> None:
    """Quantize MODEL and write an ONNX folder, verified against PyTorch before it appears.

    The folder runs in onnxruntime-genai, and by `qcompile generate FOLDER`.
    The folder of an encoder (--pooling) runs in sentence-transformers.
    """
    from qcompile.api.export_onnx import export_onnx as write
    from qcompile.calibration.text import sentence_batches, sentences

    check_recipes(recipe)
    example = None
    with kept(lambda: f"{folder} was not written"):
        if options.pooling is None:
            loaded, tokenizer = load(model)
            batches = calibration_batches(recipe, loaded, tokenizer, text, data)
        else:
            options.check_encoder()
            if data is not None:
                raise ValueError(f"an encoder reads sentences of a text, and --data {data.name} was given. Fix: --text")
            chosen = sentences(text)
            loaded, tokenizer = load_encoder(model)
            batches = sentence_batches(tokenizer, chosen, model=loaded)
            example = batches[0]
        _require_space(folder, loaded, recipe, text or data)
        flags = dataclasses.asdict(options)
        report = write(loaded, folder, recipe, batches, example=example, tokenizer=tokenizer, **flags)
    tell(report)
    tell(f"written: {folder}")


def _require_space(folder: Path, loaded: Any, recipe: str, text: object) -> None:
    require_space(folder, loaded, weight_bits(find_recipe(recipe, loaded, data=text is not None)))
