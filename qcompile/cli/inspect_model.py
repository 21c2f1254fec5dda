"""Commands that print facts and write nothing: recipes, explain, verify, advise."""

from __future__ import annotations

import json
from typing import Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from qcompile.cli.arguments import Model, RecipeName, app, cap_length, check_recipes, load, not_empty
from qcompile.cli.output import console, print_table, tell
from qcompile.pipeline.advise import Serving


@app.command()
def recipes(
    show: Annotated[
        str | None, typer.Argument(help="print one recipe as JSON", metavar="[RECIPE]", callback=not_empty)
    ] = None,
) -> None:
    """List the presets with their sources, or print one as JSON to edit."""
    from qcompile.pipeline.find_recipe import find_recipe
    from qcompile.pipeline.presets import PRESETS
    from qcompile.pipeline.training_presets import TRAINING_PRESETS

    if show:
        tell(json.dumps(find_recipe(show).to_json(), indent=2))
        return
    table = Table("recipe", "passes", "source", title="* needs calibration data")
    for name, recipe in (PRESETS | TRAINING_PRESETS).items():
        passes = " ".join(type(p).__name__ for p in recipe.passes)
        table.add_row(*map(Text, (f"{name} *" if recipe.needs else name, passes, recipe.source)))
    print_table(table)


@app.command()
def explain(model: Model) -> None:
    """Print the sites of MODEL, where smoothing scales fold, which bases can be rotated, and why not."""
    from qcompile.analysis.explain import explain as tables
    from qcompile.api.model_example import traceable_example
    from qcompile.ir.capture import capture

    loaded, _ = load(model, any_class=True)
    args, kwargs = traceable_example(loaded)
    print_table(tables(capture(loaded, args, kwargs)))


@app.command()
def verify(
    model: Model,
    recipe: RecipeName = "exact",
    length: Annotated[int, typer.Option(help="tokens of the text to compare on", min=2, max=100_000_000)] = 64,
) -> None:
    """Certify every exact pass of a recipe on MODEL, in float64; exit code 1 if a law is broken."""
    from qcompile.api.verify_model import verify_model
    from qcompile.calibration.text import batches

    check_recipes(recipe)
    loaded, tokenizer = load(model)
    length = cap_length(length, loaded, tokenizer)
    with console.status("certifying in float64"):
        report = verify_model(loaded, batches(tokenizer, length=length, count=1)[0], recipe)
    tell(report)
    if not report.certificates:
        tell("no exact pass of the recipe rewrote anything")
    if not all(c.holds for c in report.certificates):
        raise typer.Exit(1)


@app.command()
def advise(
    model: Model,
    device: Annotated[str, typer.Option(help="here, cpu, or a GPU by name: a100, l40s, h100, ..")] = "here",
    serving: Annotated[str, typer.Option(help="sync: one request at a time; async: continuous batches")] = "sync",
    data: Annotated[bool, typer.Option(help="whether calibration text is available")] = True,
) -> None:
    """Recommend a recipe for MODEL on a machine, with the reasons."""
    from qcompile.pipeline.advise import Device, check_serving, parameters
    from qcompile.pipeline.advise import advise as choose
    from qcompile.pipeline.presets import PRESETS

    check_serving(serving)
    machine = Device.named(device)
    loaded, _ = load(model, any_class=True)
    count = parameters(loaded)
    advice = choose(count, machine, cast(Serving, serving), data=data)
    tell(f"recipe:  {advice.recipe}  ({PRESETS[advice.recipe].source})", "green")
    tell(f"model:   {count / 1e6:.0f} M parameters")
    tell(f"device:  {machine.name}, {machine.memory / 1e9:.0f} GB, {serving}")
    for reason in advice.reasons:
        tell(f"because: {reason}")
