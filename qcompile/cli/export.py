"""The command that writes a model for other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompile.cli.arguments import DataSource, Model, Out, TextFile, app, calibration_batches, check_recipes, load
from qcompile.cli.interruption import kept
from qcompile.cli.output import tell

Recipes = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="preset or .json file; without it MODEL is a folder that was quantized"),
]
To = Annotated[
    str, typer.Option("--to", help="vllm, sglang, transformers, llama.cpp, executorch, or a format of files")
]
ModelDtype = Annotated[str, typer.Option("--dtype", help="of the model: bfloat16 or float32")]
Template = Annotated[
    Path | None, typer.Option(help="GGUF file of the same model; default: MODEL, where it is one", metavar="FILE")
]
Shard = Annotated[str, typer.Option(help="largest size of one file")]
Kept = Annotated[
    int | None,
    typer.Option(
        "--length", help="(executorch) tokens that a program keeps; default: the context, at most 2048", min=4
    ),
]


@app.command()
def export(
    model: Model,
    folder: Out,
    to: To = "vllm",
    recipe: Recipes = None,
    text: TextFile = None,
    data: DataSource = None,
    dtype: ModelDtype = "bfloat16",
    template: Template = None,
    shard: Shard = "5GB",
    length: Kept = None,
) -> None:
    """Write MODEL for vLLM, SGLang, transformers, llama.cpp or ExecuTorch: with the codes and scales that were chosen.

    The program that reads the format reads every weight back before the folder appears, where it is installed.
    """
    from qcompile.api.export_model import export as write
    from qcompile.api.export_model import target_of
    from qcompile.generation.embedded_models import embedded

    target = target_of(to)
    if recipe is not None:
        check_recipes(recipe)
    if target == "gguf" and template is None:
        path = embedded() if model == "embedded" else Path(model)
        template = path if path.suffix == ".gguf" else None
    with kept(lambda: f"{folder} was not written"):
        loaded, tokenizer = load(model, dtype, any_class=True)
        batches = None if recipe is None else calibration_batches(recipe, loaded, tokenizer, text, data)
        report = write(
            loaded, folder, recipe, batches, to=target, tokenizer=tokenizer, template=template, shard=shard,
            length=length,
        )  # fmt: skip
    tell(report)
    tell(f"written: {folder}")
