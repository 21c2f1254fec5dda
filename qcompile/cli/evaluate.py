"""Commands that measure quality: eval, compare, tune, sensitivity."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated

import typer

from qcompile.cli.arguments import (
    CalibrationFile,
    Dtype,
    Length,
    Model,
    TextFile,
    Windows,
    app,
    calibration_batches,
    cap_length,
    check_recipes,
    finite,
    is_exported,
    load,
    needs_text,
    not_empty,
    split_names,
)
from qcompile.cli.interruption import kept, rows_of
from qcompile.cli.output import console, print_table, tell, write_plot
from qcompile.cli.path_checks import continued_file, plotted_file
from qcompile.memory.atomic_file import write_whole


@app.command(name="eval")
def evaluate(
    model: Model,
    text: TextFile = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="quantize first", callback=not_empty)] = None,
    windows: Windows = 4,
    length: Length = 2048,
    dtype: Dtype = "float32",
) -> None:
    """Measure the perplexity of MODEL, or of an exported ONNX folder, on a text."""
    from qcompile.api.quantize import quantize as run
    from qcompile.calibration.text import read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.perplexity import perplexity

    if is_exported(model):
        from qcompile.generation.onnx_session import Session, load_tokenizer

        if recipe is not None:
            raise ValueError(f"--recipe is for a PyTorch model, and {model} is exported. Fix: omit --recipe")
        loaded, tokenizer = Session(model), load_tokenizer(model)
        length = cap_length(length, loaded, tokenizer)
        pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    else:
        if recipe is not None:
            check_recipes(recipe)
        loaded, tokenizer = load(model, dtype)
        length = cap_length(length, loaded, tokenizer)
        pieces = cut(tokenizer, read_text(text), length=length, count=windows)
        if recipe is not None:
            tell(run(loaded, recipe, calibration_batches(recipe, loaded, tokenizer, None)))
    value = perplexity(loaded, pieces)
    tell(f"perplexity {value:.4f}  ({windows} windows of {length} tokens of {text or 'the embedded text'})")


@app.command()
def compare(
    model: Model,
    recipes: Annotated[str, typer.Option(help="names or .json files, separated by commas")] = "int8,w4a16,w4a16-gptq",
    text: TextFile = None,
    calibration: CalibrationFile = None,
    windows: Windows = 4,
    length: Length = 2048,
    rotated_copy: Annotated[
        bool, typer.Option("--rotated-copy", help="measure a randomly rotated copy, off the grid of a quantized file")
    ] = False,
    dtype: Dtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON to write and to continue; the plot goes beside it", parser=continued_file, metavar="FILE"
        ),
    ] = None,
) -> None:
    """Compare recipes: perplexity, KL divergence to float, size, time. Continues where it was interrupted."""
    from qcompile.calibration.text import batches, read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.compare import Comparison, plot, table
    from qcompile.evaluation.compare import compare as measure
    from qcompile.evaluation.compare import rotated_copy as rotate

    names = split_names(recipes)
    check_recipes(*names)
    needs_text("--calibration", calibration, *names)
    loaded, tokenizer = load(model, dtype)
    length = cap_length(length, loaded, tokenizer)
    pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    label = f"{model}{' (rotated copy)' if rotated_copy else ''} on {text.name if text else 'the embedded text'}"
    measured = rotate(loaded) if rotated_copy else loaded
    data = functools.partial(batches, tokenizer, calibration, model=loaded)
    with kept(rows_of(out)):
        rows = measure(Comparison(measured, pieces, data, out, label), names)
    tell(f"{label}, {windows} windows of {length} tokens")
    print_table(table(rows))
    if out is not None:
        tell(f"written: {out}")
        write_plot(functools.partial(plot, rows), out.with_suffix(".png"))


@app.command()
def tune(
    model: Model,
    max_loss: Annotated[str, typer.Option(help="share of the float model's perplexity, as 1%")] = "1%",
    recipes: Annotated[str, typer.Option(help="in the order to try; default: by bytes, then by work")] = "",
    text: TextFile = None,
    calibration: CalibrationFile = None,
    windows: Windows = 4,
    length: Length = 2048,
    dtype: Dtype = "float32",
    out: Annotated[
        Path,
        typer.Option(
            help="JSON to write and to continue; the plot goes beside it", parser=continued_file, metavar="FILE"
        ),
    ] = Path("tune.json"),
) -> None:
    """Try recipes, the smallest first, until one keeps the perplexity. Continues where it was interrupted."""
    from qcompile.calibration.text import batches, read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.compare import Comparison, table
    from qcompile.evaluation.tune import LADDER, check_goal, plot_frontier
    from qcompile.evaluation.tune import tune as search

    share = parse_share(max_loss)
    names = split_names(recipes) if recipes else LADDER
    check_goal(share, names)
    needs_text("--calibration", calibration, *names)
    loaded, tokenizer = load(model, dtype)
    length = cap_length(length, loaded, tokenizer)
    pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    label = f"{model} on {text.name if text else 'the embedded text'}"
    data = functools.partial(batches, tokenizer, calibration, model=loaded)
    with kept(rows_of(out)):
        found = search(Comparison(loaded, pieces, data, out, label), max_loss=share, recipes=names, tell=tell)
    print_table(table(found.rows))
    tell(f"written: {out}")
    write_plot(functools.partial(plot_frontier, found.rows, share), out.with_suffix(".png"))
    if found.chosen is None:
        tell(f"no recipe stays within {share:.1%}; nearest: {found.nearest.recipe}", "red")
        raise typer.Exit(1)
    name = found.chosen.recipe
    tell(f"{name} stays within {share:.1%}: qcompile quantize {model} FOLDER -r {name}", "green")


@app.command()
def sensitivity(
    model: Model,
    formats: Annotated[str, typer.Option(help="WEIGHT or WEIGHT:ACTIVATION, separated by commas")] = (
        "int4/group128/zero,int8"
    ),
    bits: Annotated[
        float,
        typer.Option(
            help="mix formats within this average of bits per weight; 0: no mix", min=0, max=64, callback=finite
        ),
    ] = 0.0,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="quantizes the mix")] = "w4a16-gptq",
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(help="tokens to measure on", min=2, max=100_000_000)] = 512,
    dtype: Dtype = "float32",
    out: Annotated[
        Path, typer.Option(help="the mixed recipe; the plot goes beside it", parser=plotted_file, metavar="FILE")
    ] = Path("mixed.json"),
) -> None:
    """Measure the damage of each site in each format, and write a recipe that mixes formats."""
    from qcompile.api.example_inputs import flat_inputs, widen_batch
    from qcompile.calibration.context_length import within_context
    from qcompile.calibration.text import batches
    from qcompile.evaluation.sensitivity import SiteFormats, mix, mixed_recipe, plot, table
    from qcompile.evaluation.sensitivity import sensitivity as measure
    from qcompile.ir.capture import capture
    from qcompile.pipeline.find_recipe import find_recipe

    choices, base = [SiteFormats.parse(f) for f in split_names(formats)], find_recipe(recipe)
    base.check()
    loaded, tokenizer = load(model, dtype)
    length = within_context(min(256, tokens), loaded, tokenizer)
    data = batches(tokenizer, text, length=length, count=max(1, tokens // length))
    with console.status("tracing"):
        program = capture(loaded, *widen_batch((), data[0]))
    logits = hasattr(loaded, "get_output_embeddings") and loaded.get_output_embeddings() is not None
    damages = measure(program, [flat_inputs(program, d, data[0]) for d in data], choices, logits=logits)
    print_table(table(damages))
    write_plot(functools.partial(plot, damages), out.with_suffix(".png"))
    if bits:
        weights = sum(s.numel() for s in (program.weights[name] for name in {d.site for d in damages}))
        chosen = mix(damages, nbytes=int(bits * weights / 8))
        write_whole(out, json.dumps(mixed_recipe(base, chosen).to_json(), indent=1) + "\n")
        counts = ", ".join(f"{sum(c == choice for c in chosen.values())} x {choice}" for choice in choices)
        tell(f"written: {out}  ({counts})")


def parse_share(text: str) -> float:
    """ "1%" or "0.01" -> 0.01."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"--max-loss {text!r} is no share. Fix: write a share, as 1% or 0.01") from None
