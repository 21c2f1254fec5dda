"""Commands that measure: quality, speed, sensitivity, and the searches that rest on them."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qcompile.cli.arguments import Dtype, Model, TextFile, app, calibration_batches, console, load


@app.command(name="eval")
def evaluate(
    model: Model,
    text: TextFile = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="quantize first")] = None,
    windows: Annotated[int, typer.Option(help="windows of the text")] = 4,
    length: Annotated[int, typer.Option(help="tokens in a window")] = 2048,
    dtype: Dtype = "float32",
) -> None:
    """Perplexity of MODEL (or of an exported ONNX folder) on a text file."""
    from qcompile.api.quantize import quantize as run
    from qcompile.calibration.text import read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.perplexity import perplexity

    if (Path(model) / "model.onnx").is_file():
        from qcompile.generation.onnx_session import Session, tokenizer_of

        if recipe is not None:
            raise ValueError(f"--recipe is for a PyTorch model, and {model} is exported as it is")
        loaded, tokenizer = Session(model), tokenizer_of(model)
    else:
        loaded, tokenizer = load(model, dtype)
        if recipe is not None:
            console.print(str(run(loaded, recipe, calibration_batches(recipe, tokenizer, None))), highlight=False)
    pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    value = perplexity(loaded, pieces)
    console.print(f"perplexity {value:.4f}  ({windows} windows of {length} tokens of {text or 'the embedded text'})")


@app.command()
def compare(
    model: Model,
    recipes: Annotated[str, typer.Option(help="names or .json files, separated by commas")] = "int8,w4a16,w4a16-gptq",
    text: TextFile = None,
    calibration: Annotated[Path | None, typer.Option(help="text to calibrate on; default: the embedded text")] = None,
    windows: Annotated[int, typer.Option(help="windows of the text")] = 4,
    length: Annotated[int, typer.Option(help="tokens in a window")] = 2048,
    twin: Annotated[bool, typer.Option(help="on a randomly rotated copy, off the grid of a quantized file")] = False,
    dtype: Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON to write and to continue; the plot goes beside it")] = None,
) -> None:
    """Perplexity, divergence from float, size and time of several recipes; goes on where it stopped."""
    from qcompile.calibration.text import batches, read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.compare import Comparison, plot, rotated_twin, table
    from qcompile.evaluation.compare import compare as measure

    loaded, tokenizer = load(model, dtype)
    pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    label = f"{model}{' (rotated twin)' if twin else ''} on {text.name if text else 'the embedded text'}"
    model_of = rotated_twin(loaded) if twin else loaded
    data = functools.partial(batches, tokenizer, calibration)
    rows = measure(Comparison(model_of, pieces, data, out, label), [name.strip() for name in recipes.split(",")])
    console.print(f"{label}, {windows} windows of {length} tokens")
    console.print(table(rows))
    if out is not None:
        plot(rows, out.with_suffix(".png"))
        console.print(f"written: {out}, {out.with_suffix('.png')}")


@app.command()
def tune(
    model: Model,
    max_loss: Annotated[str, typer.Option(help="of the float model's perplexity, as 1%")] = "1%",
    recipes: Annotated[str, typer.Option(help="in the order to try; default: by bytes, then by work")] = "",
    text: TextFile = None,
    calibration: Annotated[Path | None, typer.Option(help="text to calibrate on; default: the embedded text")] = None,
    windows: Annotated[int, typer.Option(help="windows of the text")] = 4,
    length: Annotated[int, typer.Option(help="tokens in a window")] = 2048,
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option(help="JSON to write and to continue; the plot goes beside it")] = Path(
        "tune.json"
    ),
) -> None:
    """Try recipes, the smallest first, until one keeps the perplexity; goes on where it stopped."""
    from qcompile.calibration.text import batches, read_text
    from qcompile.calibration.text import windows as cut
    from qcompile.evaluation.compare import Comparison, table
    from qcompile.evaluation.tune import LADDER, plot_frontier
    from qcompile.evaluation.tune import tune as search

    share = _share(max_loss)
    names = [name.strip() for name in recipes.split(",")] if recipes else LADDER
    loaded, tokenizer = load(model, dtype)
    pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    label = f"{model} on {text.name if text else 'the embedded text'}"
    data = functools.partial(batches, tokenizer, calibration)
    found = search(
        Comparison(loaded, pieces, data, out, label), max_loss=share, recipes=names,
        tell=functools.partial(console.print, highlight=False),
    )  # fmt: skip
    console.print(table(found.rows))
    plot_frontier(found.rows, share, out.with_suffix(".png"))
    console.print(f"written: {out}, {out.with_suffix('.png')}")
    if found.chosen is None:
        console.print(f"[red]no recipe stays within {share:.1%}[/]; nearest: {found.nearest.recipe}")
        raise typer.Exit(1)
    console.print(f"[green]{found.chosen.recipe}[/] stays within {share:.1%}: qcompile quantize {model} FOLDER "
                  f"-r {found.chosen.recipe}", highlight=False)  # fmt: skip


@app.command()
def sensitivity(
    model: Model,
    formats: Annotated[str, typer.Option(help="WEIGHT or WEIGHT:ACTIVATION, separated by commas")] = (
        "int4/group128/zero,int8"
    ),
    bits: Annotated[float, typer.Option(help="mix formats under so many bits a weight; 0: do not mix")] = 0.0,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="what quantizes the mix")] = "w4a16-gptq",
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(help="tokens to measure on")] = 512,
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option(help="the mixed recipe; the plot goes beside it")] = Path("mixed.json"),
) -> None:
    """The damage of every site in every format, one at a time, and a recipe that mixes them."""
    import json

    from qcompile.api.example_inputs import flat_inputs, widen_batch
    from qcompile.calibration.text import batches
    from qcompile.evaluation.sensitivity import Kind, mix, mixed_recipe, plot, table
    from qcompile.evaluation.sensitivity import sensitivity as measure
    from qcompile.ir.capture import capture
    from qcompile.pipeline.presets import find_recipe

    kinds, base = [Kind.parse(f.strip()) for f in formats.split(",")], find_recipe(recipe)
    loaded, tokenizer = load(model, dtype)
    data = batches(tokenizer, text, length=min(256, tokens), count=max(1, tokens // 256))
    with console.status("tracing"):
        program = capture(loaded, *widen_batch((), data[0]))
    logits = hasattr(loaded, "get_output_embeddings") and loaded.get_output_embeddings() is not None
    damages = measure(program, [flat_inputs(program, d, data[0]) for d in data], kinds, logits=logits)
    console.print(table(damages))
    plot(damages, out.with_suffix(".png"))
    console.print(f"written: {out.with_suffix('.png')}")
    if bits:
        weights = sum(s.numel() for s in (program.weights[name] for name in {d.site for d in damages}))
        chosen = mix(damages, nbytes=int(bits * weights / 8))
        out.write_text(json.dumps(mixed_recipe(base, chosen).to_json(), indent=1) + "\n")
        counts = {str(k): sum(kind == k for kind in chosen.values()) for k in kinds}
        console.print(f"written: {out}  {counts}", highlight=False)


@app.command()
def advise(
    model: Model,
    device: Annotated[str, typer.Option(help="here, cpu, or a GPU as a100, l40s, h100")] = "here",
    serving: Annotated[str, typer.Option(help="sync: one request at a time; async: continuous batches")] = "sync",
    data: Annotated[bool, typer.Option(help="whether calibration text is at hand")] = True,
) -> None:
    """Which recipe for this model on a machine, and why."""
    from qcompile.pipeline.advise import Device, parameters
    from qcompile.pipeline.advise import advise as choose
    from qcompile.pipeline.presets import PRESETS

    machine = Device.named(device)
    loaded, _ = load(model)
    count = parameters(loaded)
    advice = choose(count, machine, serving, data=data)
    sheet = Table(show_header=False)
    sheet.add_row("model", f"{count / 1e6:.0f} M parameters")
    sheet.add_row("device", f"{machine.name}, {machine.memory / 1e9:.0f} GB, {serving}")
    sheet.add_row("recipe", f"[green]{advice.recipe}[/]: {PRESETS[advice.recipe].source}")
    for reason in advice.reasons:
        sheet.add_row("because", reason)
    console.print(sheet)


@app.command()
def bench(
    model: Model = "embedded",
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", help="repeat for several")] = None,
    prompt: Annotated[int, typer.Option(help="prompt tokens")] = 512,
    tokens: Annotated[int, typer.Option(help="decoded tokens")] = 16,
    rounds: Annotated[int, typer.Option(help="counted rounds")] = 5,
    dtype: Dtype = "bfloat16",
    against: Annotated[list[str] | None, typer.Option(help="another ONNX folder; repeat for several")] = None,
    out: Annotated[Path | None, typer.Option(help="write the numbers as JSON")] = None,
) -> None:
    """Prefill and decode speed against torch.compile (Inductor) of the float model, interleaved.

    Of an exported ONNX folder: its own speed, beside that of other folders (--against).
    """
    from qcompile.evaluation.throughput import compare_with_inductor

    if (Path(model) / "model.onnx").is_file():
        if recipe:
            raise ValueError(f"--recipe is for a PyTorch model, and {model} is exported: name folders with --against")
        _bench_folders([model, *(against or [])], prompt, tokens, rounds, out)
        return
    if against:
        raise ValueError(f"--against is for ONNX folders, and {model} is none: export it first (qcompile export-onnx)")
    loaded, _ = load(model, dtype)
    result = compare_with_inductor(loaded, recipe or ["int8", "w4a8"], prompt=prompt, new=tokens, rounds=rounds)
    console.print(result.table())
    if out is not None:
        result.write(out)


def _bench_folders(folders: list[str], prompt: int, tokens: int, rounds: int, out: Path | None) -> None:
    from qcompile.evaluation.onnx_throughput import speeds
    from qcompile.generation.onnx_session import Session
    from qcompile.memory.environment import versions

    found = speeds({f: Session(f) for f in folders}, prompt=prompt, new=tokens, rounds=rounds)
    table = Table("folder", f"prefill {prompt}, tokens/s", "decode, tokens/s")
    for name, speed in found.items():
        table.add_row(name, f"{speed.prefill:.0f}", f"{speed.decode:.1f}")
    console.print(table)
    if out is not None:
        rows = {name: dataclasses.asdict(speed) for name, speed in found.items()}
        out.write_text(json.dumps({"versions": versions(), "prompt": prompt, "rows": rows}, indent=1) + "\n")


def _share(text: str) -> float:
    """ "1%" or "0.01" -> 0.01."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"--max-loss {text!r}: write a share, as 1% or 0.01") from None
