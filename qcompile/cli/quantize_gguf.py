"""`qcompile quantize IN.gguf OUT.gguf`: one file into another, for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from qcompile.calibration.dataset import DataRows
from qcompile.calibration.ranks import Ranks
from qcompile.cli.arguments import calibration_batches, is_read_in_parts, load
from qcompile.cli.interruption import kept, said_finished
from qcompile.cli.output import note, print_table, tell
from qcompile.cli.path_checks import output_file, output_folder
from qcompile.recipe.report import Report

SUFFIX = ".gguf"
_COLUMNS = 256  # a multiple of every block: what a format is checked with before the model is read


def output_model(value: str | Path) -> Path:
    """A folder to write that does not exist or is empty, or a .gguf file that does not exist."""
    if Path(value).suffix != SUFFIX:
        return output_folder(value)
    path = output_file(value)
    if path.exists():
        raise typer.BadParameter(f"{path} exists. Fix: choose another name, or remove it")
    return path


def quantize_file(
    model: str, file: Path, recipe: str, text: Path | None, data: DataRows | None = None, **run: Any
) -> Report:
    """Quantize a GGUF file into another, whose names and metadata are those of the first.

    The file is read and written in parts; of the few architectures whose tensors transformers converts while it loads
    all of them, it is read whole.

    Args:
        model: a .gguf file, or "embedded".
        file: to write.
        recipe: weight-only, in formats that GGUF has.
        text: to calibrate on, or None.
        data: a data set to calibrate on, or None.
        **run: device, memory, resume and dump of `quantize_folder`.

    Raises:
        ValueError: MODEL is no GGUF file, the recipe is none for one, or a flag is none for a file that is read whole.
    """
    from qcompile.api.export_model import export
    from qcompile.api.quantize_folder import quantize_folder
    from qcompile.checkpoint.writers.gguf_summary import quantized_types
    from qcompile.generation.embedded_models import embedded

    source = embedded() if model == "embedded" else Path(model)
    if source.suffix != SUFFIX:
        raise ValueError(
            f"{file} is made after a GGUF file, and {model} is none. Fix: name a folder to write, or "
            f"qcompile export {model} FOLDER --to llama.cpp --template FILE.gguf"
        )
    check_gguf_recipe(recipe)
    stream = is_read_in_parts(str(source))
    for flag in [name for name in ("dump", "device") if not stream and run.get(name, "cpu") not in (None, "cpu")]:
        raise ValueError(f"--{flag} goes with a file that is read in parts, and {source.name} is none. Fix: drop it")
    with kept(lambda: f"{file} was not written{said_finished(file)}"):
        loaded, tokenizer = load(model, stream=stream)
        stored = quantized_types(source)
        if stored:
            note(
                f"{source.name} holds {', '.join(stored)} already: what was rounded is rounded again. "
                "Fix: take the F16 or BF16 file"
            )
        batches = calibration_batches(recipe, loaded, tokenizer, text, data)
        if stream:
            report = quantize_folder(source, file, recipe, batches, model=loaded, **run)
        else:
            report = export(loaded, file, recipe, batches, to="gguf", template=source)
    if not Ranks.joined().is_first:
        return report
    tell(report)
    print_table(type_table(file))
    before, after = (path.stat().st_size / 1e6 for path in (source, file))
    tell(f"written: {file}  ({after:.1f} MB, from {before:.1f} MB)")
    return report


def check_gguf_recipe(name: str) -> None:
    """Refuse a recipe whose formats no block of GGUF has, before a model is read. Raises ValueError."""
    from qcompile.checkpoint.writers.gguf_blocks import block_type
    from qcompile.passes import Quantize
    from qcompile.pipeline.find_recipe import find_recipe

    if name == "auto":
        raise ValueError("recipe 'auto' chooses formats for PyTorch. Fix: -r gguf-q4_k, or another gguf-* preset")
    recipe = find_recipe(name)
    recipe.check()
    for config in recipe.passes:
        if isinstance(config, Quantize):
            block_type(f"recipe {recipe.name!r}", config.weight, config.act, _COLUMNS)
            if config.lm_head is not None:
                block_type(f"recipe {recipe.name!r}, logits", config.lm_head, config.lm_head_act, _COLUMNS)


def type_table(path: Path) -> Table:
    """The tensors of a GGUF file by type."""
    from qcompile.checkpoint.writers.gguf_summary import stored_types

    rows = stored_types(path)
    table = Table("type", "tensors", "MB", "bits a value")
    for row in rows:
        table.add_row(row.name, str(row.tensors), f"{row.nbytes / 1e6:.1f}", f"{row.bits:.2f}")
    values, size = sum(row.values for row in rows), sum(row.nbytes for row in rows)
    table.add_row("all", str(sum(row.tensors for row in rows)), f"{size / 1e6:.1f}", f"{8 * size / max(1, values):.2f}")
    return table
