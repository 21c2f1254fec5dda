"""Commands that measure quality: eval, compare, tune, sensitivity."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qcompile.calibration.dataset import DataRows
from qcompile.cli.arguments import (
    CalibrationFile,
    DataSource,
    Dtype,
    Length,
    Model,
    ReportFile,
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
from qcompile.cli.output import console, print_table, tell, write_plot, write_report
from qcompile.cli.path_checks import continued_file, plotted_file
from qcompile.cli.task_flags import (
    IncludePath,
    Limit,
    Tasks,
    check_task_output,
    print_tasks,
    task_names,
    task_run,
)
from qcompile.memory.atomic_file import write_whole


@app.command(name="eval")
def evaluate(
    model: Model,
    text: TextFile = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="quantize first", callback=not_empty)] = None,
    windows: Windows = 4,
    length: Length = 2048,
    dtype: Dtype = "float32",
    tasks: Tasks = None,
    limit: Limit = None,
    include_path: IncludePath = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write, of tasks", metavar="FILE")] = None,
) -> None:
    """Measure MODEL, or an exported ONNX folder: perplexity on a text, or in its place tasks of lm-eval."""
    from qcompile.api.quantize import quantize as run
    from qcompile.calibration.text import read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.perplexity import perplexity

    check_task_output(None if tasks is None else [tasks], text, out)
    names = task_names(tasks, limit, include_path)
    if is_exported(model):
        from qcompile.generation.onnx_session import Session, load_tokenizer

        if recipe is not None:
            raise ValueError(f"--recipe is for a PyTorch model, and {model} is exported. Fix: omit --recipe")
        loaded, tokenizer = Session(model), load_tokenizer(model)
        length = cap_length(length, loaded, tokenizer)
        pieces = [] if names else cut(tokenizer, read_text(text), length=length, count=windows)
    else:
        if recipe is not None:
            check_recipes(recipe)
        loaded, tokenizer = load(model, dtype)
        length = cap_length(length, loaded, tokenizer)
        pieces = [] if names else cut(tokenizer, read_text(text), length=length, count=windows)
        if recipe is not None:
            tell(run(loaded, recipe, calibration_batches(recipe, loaded, tokenizer, None)))
    run_of_tasks = task_run(names, tokenizer, include_path, limit, length)
    if run_of_tasks is not None:
        print_tasks(loaded, run_of_tasks, out, {"model": model, "recipe": recipe})
        return
    value = perplexity(loaded, pieces)
    tell(f"perplexity {value:.4f}  ({windows} windows of {length} tokens of {text or 'the embedded text'})")


@app.command()
def compare(
    model: Model,
    recipes: Annotated[str, typer.Option(help="names or .json files, separated by commas")] = "int8,w4a16,w4a16-gptq",
    text: TextFile = None,
    calibration: CalibrationFile = None,
    data: DataSource = None,
    windows: Windows = 4,
    length: Length = 2048,
    tasks: Tasks = None,
    limit: Limit = None,
    include_path: IncludePath = None,
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
    report_file: ReportFile = None,
) -> None:
    """Compare recipes: perplexity, KL divergence to float, tasks, size, time. Continues where it was interrupted."""
    from qcompile.calibration.text import read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.compare import Comparison, plot, table
    from qcompile.evaluation.compare import compare as measure
    from qcompile.evaluation.compare import rotated_copy as rotate

    names = split_names(recipes)
    check_recipes(*names)
    needs_text("--calibration", calibration, *names, data=data)
    chosen_tasks = task_names(tasks, limit, include_path)
    loaded, tokenizer = load(model, dtype)
    length = cap_length(length, loaded, tokenizer)
    pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    label = f"{model}{' (rotated copy)' if rotated_copy else ''} on {text.name if text else 'the embedded text'}"
    measured = rotate(loaded) if rotated_copy else loaded
    read = _calibration(tokenizer, loaded, calibration, data)
    with kept(rows_of(out)):
        run = task_run(chosen_tasks, tokenizer, include_path, limit, length)
        rows = measure(Comparison(measured, pieces, read, out, label, run), names)
    tell(f"{label}, {windows} windows of {length} tokens")
    print_table(table(rows))
    if out is not None:
        tell(f"written: {out}")
        write_plot(functools.partial(plot, rows), out.with_suffix(".png"))
    drawings = {"Perplexity by bytes of quantized weights": functools.partial(plot, rows)}
    write_report(report_file, f"Recipes on {label}", rows=rows, drawings=drawings)


@app.command()
def tune(
    model: Model,
    max_loss: Annotated[
        str, typer.Option(help="share of the float model's perplexity, or with --tasks of its scores, as 1%")
    ] = "1%",
    recipes: Annotated[str, typer.Option(help="in the order to try; default: by bytes, then by work")] = "",
    text: TextFile = None,
    calibration: CalibrationFile = None,
    data: DataSource = None,
    windows: Windows = 4,
    length: Length = 2048,
    tasks: Tasks = None,
    limit: Limit = None,
    include_path: IncludePath = None,
    dtype: Dtype = "float32",
    out: Annotated[
        Path,
        typer.Option(
            help="JSON to write and to continue; the plot goes beside it", parser=continued_file, metavar="FILE"
        ),
    ] = Path("tune.json"),
    report_file: ReportFile = None,
) -> None:
    """Try recipes, the smallest first, until one keeps the perplexity, or with --tasks the scores.

    Continues where it was interrupted.
    """
    from qcompile.calibration.text import read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.compare import Comparison, table
    from qcompile.evaluation.tune import LADDER, check_goal, plot_frontier
    from qcompile.evaluation.tune import tune as search

    share = parse_share(max_loss)
    names = split_names(recipes) if recipes else LADDER
    check_goal(share, names)
    needs_text("--calibration", calibration, *names, data=data)
    chosen_tasks = task_names(tasks, limit, include_path)
    loaded, tokenizer = load(model, dtype)
    length = cap_length(length, loaded, tokenizer)
    pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    label = f"{model} on {text.name if text else 'the embedded text'}"
    read = _calibration(tokenizer, loaded, calibration, data)
    with kept(rows_of(out)):
        run = task_run(chosen_tasks, tokenizer, include_path, limit, length)
        found = search(Comparison(loaded, pieces, read, out, label, run), max_loss=share, recipes=names, tell=tell)
    print_table(table(found.rows))
    tell(f"written: {out}")
    draw = functools.partial(plot_frontier, found.rows, share)
    write_plot(draw, out.with_suffix(".png"))
    lost = "perplexity" if tasks is None else "task scores"
    caption = f"Loss of {lost} by bytes of quantized weights; the goal is {share:.1%}"
    write_report(report_file, f"Recipes on {label}", rows=found.rows, drawings={caption: draw})
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
    report_file: ReportFile = None,
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
    draw = functools.partial(plot, damages)
    write_plot(draw, out.with_suffix(".png"))
    caption = "KL divergence to the float model with one site quantized, in the order of the graph"
    write_report(report_file, f"Sites of {model}", damages=damages, drawings={caption: draw})
    if bits:
        weights = sum(s.numel() for s in (program.weights[name] for name in {d.site for d in damages}))
        chosen = mix(damages, nbytes=int(bits * weights / 8))
        write_whole(out, json.dumps(mixed_recipe(base, chosen).to_json(), indent=1) + "\n")
        counts = ", ".join(f"{sum(c == choice for c in chosen.values())} x {choice}" for choice in choices)
        tell(f"written: {out}  ({counts})")


def _calibration(tokenizer: Any, model: Any, text: Path | None, data: DataRows | None) -> Callable[[], list[Any]]:
    """Reads the calibration batches of a comparison."""
    from qcompile.calibration.dataset import dataset_batches
    from qcompile.calibration.text import batches

    if data is not None:
        return functools.partial(dataset_batches, tokenizer, data, model=model)
    return functools.partial(batches, tokenizer, text, model=model)


def parse_share(text: str) -> float:
    """ "1%" or "0.01" -> 0.01."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"--max-loss {text!r} is no share. Fix: write a share, as 1% or 0.01") from None
