"""What the commands share: the application, its console, and how a model, a recipe and a text are named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    name="qcompile",
    help="Quantize PyTorch models by rewriting their graphs, with a certificate for every rewriting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Model = Annotated[str, typer.Argument(help="folder, .gguf file, hub id, or 'embedded'", metavar="MODEL")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="preset (see `qcompile recipes`) or a .json file")]
TextFile = Annotated[Path | None, typer.Option("--text", help="text file; default: the embedded text")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16")]
Out = Annotated[Path, typer.Argument(help="folder to write; must not exist or be empty", metavar="FOLDER")]


def load(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A model and its tokenizer by name, with a spinner."""
    import torch

    from qcompile.generation.pretrained import load_pretrained

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: use float32 or bfloat16")
    with console.status(f"loading {name}"):
        return load_pretrained("" if name == "embedded" else name, getattr(torch, dtype))


def load_encoder(name: str) -> tuple[Any, Any]:
    """A model without a head and its tokenizer by name, with a spinner."""
    from qcompile.generation.pretrained import load_encoder as read

    with console.status(f"loading {name}"):
        return read("" if name == "embedded" else name)


def calibration_batches(recipe: str, tokenizer: Any, text: Path | None) -> Any:
    """Batches if the recipe needs any, else None."""
    from qcompile.calibration.text import batches
    from qcompile.pipeline.presets import find_recipe

    if recipe == "auto":  # with a text of the user's, any preset may be chosen
        return None if text is None else batches(tokenizer, text)
    return batches(tokenizer, text) if find_recipe(recipe).needs else None
