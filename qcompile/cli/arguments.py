"""What commands share: the application, the types of their arguments, and reading a model, a recipe and a text."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import torch
import typer
from rich.text import Text

from qcompile.calibration.dataset import DataRows
from qcompile.cli.interruption import Commands
from qcompile.cli.output import console, note, tell
from qcompile.cli.path_checks import data_rows, html_file, output_folder, text_file
from qcompile.memory.process import available_bytes
from qcompile.version import VERSION

app = typer.Typer(
    name="qcompile",
    help="Quantize PyTorch models by rewriting their graphs, with a certificate for every exact rewriting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    cls=Commands,
)


def _print_version(requested: bool) -> None:
    if requested:
        tell(f"qcompile {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options in front of a command."""


def not_empty(value: str | None) -> str | None:
    """For typer: an option that was given says something."""
    if value is not None and not value.strip():
        raise typer.BadParameter("it is empty")
    return value


def not_empty_list(values: list[str] | None) -> list[str] | None:
    """For typer: each of several does."""
    for value in values or ():
        not_empty(value)
    return values


def finite(value: float) -> float:
    """For typer: NaN passes its ranges."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite value")
    return value


def text_option(flag: str, meaning: str) -> Any:
    """An option that names a text."""
    return typer.Option(flag, help=meaning, parser=text_file, metavar="FILE")


Model = Annotated[
    str, typer.Argument(help="folder, .gguf file, hub id, or 'embedded'", metavar="MODEL", callback=not_empty)
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="preset (see `qcompile recipes`) or a .json file")]
TextFile = Annotated[Path | None, text_option("--text", "text file; default: the embedded text")]
CalibrationFile = Annotated[
    Path | None, text_option("--calibration", "text to calibrate on, where a recipe needs it; default: embedded")
]
DataSource = Annotated[
    DataRows | None,
    typer.Option(
        "--data",
        help="data set to calibrate on, rows with text or messages: a .jsonl file, or NAME:CONFIG@SPLIT of datasets",
        parser=data_rows,
        metavar="DATA",
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", help="HTML file to write: tables, certificates, plots", parser=html_file, metavar="FILE"),
]
Windows = Annotated[int, typer.Option(help="windows of the text", min=1, max=1_000_000)]
Length = Annotated[
    int, typer.Option(help="tokens per window; at most the context of the model", min=2, max=100_000_000)
]
Dtype = Annotated[str, typer.Option(help="of the model: float32 or bfloat16")]
Out = Annotated[
    Path, typer.Argument(help="folder to write; must not exist, or be empty", metavar="FOLDER", parser=output_folder)
]


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


def load(name: str, dtype: str = "float32", *, any_class: bool = False, stream: bool = False) -> tuple[Any, Any]:
    """A model and its tokenizer by name, with a spinner.

    Args:
        name: of the model.
        dtype: of the weights.
        any_class: also one that generates no text.
        stream: leave the weights in their files; so it is where they do not fit in memory, and said.
    """
    from qcompile.generation.pretrained import load_pretrained

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype!r} is unknown. Fix: use float32 or bfloat16")
    if not stream and (size := _bytes_of(name, dtype)) > _SHARE * available_bytes():
        stream = True
        note(f"{name} takes {size / 1e9:.1f} GB, more than memory has for it: weights are read as they are needed")
    with console.status(Text(f"loading {name}")):
        options = {option: True for option, is_set in (("any_class", any_class), ("stream", stream)) if is_set}
        return load_pretrained("" if name == "embedded" else name, getattr(torch, dtype), **options)


def _bytes_of(name: str, dtype: str) -> int:
    """What the weights of safetensors files, or of a GGUF file, take in memory; 0 of another model."""
    from qcompile.generation.model_files import check_gguf

    if name.endswith(".gguf") and is_read_in_parts(name):
        return check_gguf(Path(name)) * (2 if dtype == "bfloat16" else 4)
    files = list(Path(name).glob("*.safetensors")) if name and Path(name).is_dir() else []
    quantized = (Path(name) / "qcompile.json").exists()
    wider = 2 if dtype == "float32" and not quantized else 1  # most folders hold 16 bits a value
    return wider * sum(file.stat().st_size for file in files)


_SHARE = 0.7
"""Of the free memory that weights may take: activations need the rest."""


def load_encoder(name: str) -> tuple[Any, Any]:
    """A model without a head and its tokenizer by name, with a spinner."""
    from qcompile.generation.pretrained import load_encoder as read

    with console.status(Text(f"loading {name}")):
        return read("" if name == "embedded" else name)


def check_recipes(*names: str) -> None:
    """Refuse unknown and impossible recipes, before a model is loaded."""
    from qcompile.pipeline.find_recipe import find_recipe

    for name in names:
        if name != "auto":
            find_recipe(name).check()


def needs_text(flag: str, text: Path | None, *recipes: str, data: DataRows | None = None) -> bool:
    """Whether recipes need calibration data; says so where a text or a data set was given and none does.

    Raises:
        ValueError: both were given.
    """
    from qcompile.pipeline.find_recipe import find_recipe

    if text is not None and data is not None:
        raise ValueError(f"{flag} {text} and --data {data.name} are both given. Fix: drop one of the two")
    given = text is not None or data is not None
    if any(given if name == "auto" else find_recipe(name).needs for name in recipes):
        return True
    if data is not None:
        note(f"--data {data.name} is ignored: {', '.join(recipes)} needs no calibration data")
    if text is not None:
        note(f"{flag} {text} is ignored: {', '.join(recipes)} needs no calibration data")
    return False


def calibration_batches(
    recipe: str, model: Any, tokenizer: Any, text: Path | None, data: DataRows | None = None
) -> Any:
    """Batches of a text or a data set if the recipe needs any, else None."""
    from qcompile.calibration.dataset import dataset_batches
    from qcompile.calibration.text import CALIBRATION_LENGTH, batches

    if not needs_text("--text", text, recipe, data=data):
        return None
    length = cap_length(CALIBRATION_LENGTH, model, tokenizer, "calibration windows")
    return batches(tokenizer, text, length=length) if data is None else dataset_batches(tokenizer, data, length=length)


def cap_length(length: int, model: Any, tokenizer: Any, what: str = "windows") -> int:
    """The tokens of a window, at most the context of the model; says where that is less."""
    from qcompile.calibration.context_length import within_context

    capped = within_context(length, model, tokenizer)
    if capped < length:
        note(f"{what} of {capped} tokens, not {length}: the context of the model ends there")
    return capped


def is_read_in_parts(model: str) -> bool:
    """Whether MODEL is a float model in safetensors files, or in a GGUF file whose tensors are read one at a time."""
    from qcompile.checkpoint.stored_gguf import reads_in_parts
    from qcompile.generation.model_files import DamagedFile, check_gguf

    folder = Path(model)
    if folder.suffix == ".gguf":
        try:
            check_gguf(folder)
        except DamagedFile:  # who loads it says what is wrong
            return False
        return reads_in_parts(folder)
    names = ("model.safetensors", "model.safetensors.index.json")
    return any((folder / name).is_file() for name in names) and not (folder / "qcompile.json").exists()


def is_exported(model: str) -> bool:
    """Whether MODEL is a folder that `qcompile export-onnx` wrote."""
    return (Path(model) / "model.onnx").is_file()


def is_packaged(model: str) -> bool:
    """Whether MODEL is a file that `qcompile package` wrote."""
    return model.endswith(".pt2")


def open_package(model: str) -> tuple[Any, Any]:
    """A packaged causal LM and its tokenizer.

    Raises:
        ValueError: it is no package, it generates no text, or it has no tokenizer.
    """
    from qcompile.api.load_package import load_package

    opened = load_package(model)
    if not hasattr(opened, "generate"):
        raise ValueError(f"{model} generates no text. Fix: call it from Python, qcompile.load_package")
    if opened.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer. Fix: package it with one, qcompile.package(.., tokenizer=..)")
    return opened, opened.tokenizer


def split_names(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return [name.strip() for name in text.split(",")]
