"""What commands share: the application, the types of their arguments, and reading a model, a recipe and a text."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import torch
import typer

from qcompile.cli.output import console

app = typer.Typer(
    name="qcompile",
    help="Quantize PyTorch models by rewriting their graphs, with a certificate for every exact rewriting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="folder, .gguf file, hub id, or 'embedded'", metavar="MODEL")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="preset (see `qcompile recipes`) or a .json file")]
TextFile = Annotated[Path | None, typer.Option("--text", help="text file; default: the embedded text")]
CalibrationFile = Annotated[Path | None, typer.Option("--calibration", help="text to calibrate on; default: embedded")]
Windows = Annotated[int, typer.Option(help="windows of the text")]
Length = Annotated[int, typer.Option(help="tokens per window")]
Dtype = Annotated[str, typer.Option(help="of the model: float32 or bfloat16")]
Out = Annotated[Path, typer.Argument(help="folder to write; must not exist, or be empty", metavar="FOLDER")]


def flags_of(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `options` of a command by one flag per field of a dataclass.

    Args:
        options: every field has a default and `metadata["help"]`.
    """

    def replace(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(options)
        flags = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[hints[field.name], typer.Option(*_names(field), help=field.metadata["help"])],
            )
            for field in fields(options)
        ]

        @functools.wraps(command)
        def call(**arguments: Any) -> None:
            chosen = {flag.name: arguments.pop(flag.name) for flag in flags}
            command(**arguments, options=options(**chosen))

        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.name != "options"] + flags
        cast(Any, call).__signature__ = own.replace(parameters=parameters)  # typer reads it; a function declares none
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return replace


def _names(field: Field[Any]) -> list[str]:
    """A switch that is off by default needs no flag that switches it off."""
    return [f"--{field.name.replace('_', '-')}"] if field.default is False else []


def load(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A model and its tokenizer by name, with a spinner."""
    from qcompile.generation.pretrained import load_pretrained

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype!r} is unknown. Fix: use float32 or bfloat16")
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


def is_exported(model: str) -> bool:
    """Whether MODEL is a folder that `qcompile export-onnx` wrote."""
    return (Path(model) / "model.onnx").is_file()


def split_names(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return [name.strip() for name in text.split(",")]
