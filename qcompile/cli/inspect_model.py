"""Commands that tell something: which recipes there are, what a model is made of, whether a law holds."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from qcompile.cli.arguments import Model, RecipeName, app, console, load


@app.command()
def recipes(
    show: Annotated[str | None, typer.Argument(help="print one recipe as JSON")] = None,
) -> None:
    """List the presets with their sources, or print one as JSON to edit."""
    from qcompile.pipeline.presets import PRESETS, find_recipe

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
    from qcompile.analysis.explain import explain as tables
    from qcompile.api.example_inputs import traceable_example
    from qcompile.ir.capture import capture

    loaded, _ = load(model)
    args, kwargs = traceable_example(loaded)
    console.print(tables(capture(loaded, args, kwargs)))


@app.command()
def verify(
    model: Model, recipe: RecipeName = "exact", length: Annotated[int, typer.Option(help="tokens")] = 64
) -> None:
    """Certify every exact pass of a recipe on MODEL, in float64."""
    from qcompile.api.verify_model import verify_model
    from qcompile.calibration.text import batches

    loaded, tokenizer = load(model)
    with console.status("certifying in float64"):
        report = verify_model(loaded, batches(tokenizer, length=length, count=1)[0], recipe)
    console.print(str(report), highlight=False)
    if not report.certificates:
        console.print("the recipe has no exact pass that did anything")
    if not all(c.holds for c in report.certificates):
        raise typer.Exit(1)
