"""Commands that train: finetune (adapters for a quantized model) and train (in low precision)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table
from torch import nn

from qcompile.cli.arguments import (
    Length,
    Model,
    Out,
    RecipeName,
    TextFile,
    app,
    calibration_batches,
    cap_length,
    check_recipes,
    finite,
    load,
)
from qcompile.cli.interruption import kept
from qcompile.cli.output import console, note, print_table, tell, write_plot
from qcompile.training.fit import CURVE, Fit, held_out_loss, newest_checkpoint, plot_losses

Steps = Annotated[int, typer.Option(help="steps of the optimizer", min=1)]
LearningRate = Annotated[float, typer.Option("--lr", help="learning rate after the warm-up", min=0.0, callback=finite)]
Batch = Annotated[int, typer.Option(help="windows of one forward pass", min=1)]
Accumulate = Annotated[int, typer.Option(help="forward passes of one step", min=1)]
SaveEvery = Annotated[int, typer.Option(help="steps between checkpoints", min=1)]
Seed = Annotated[int, typer.Option(help="of the order of windows, and of what is drawn")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in FOLDER.training")]

_HELD_OUT = 16
_SETTINGS = "run.json"


@app.command()
def finetune(
    model: Model,
    folder: Out,
    text: TextFile = None,
    recipe: RecipeName = "w4a16-g32",
    rank: Annotated[int, typer.Option(help="of the adapters", min=1)] = 16,
    alpha: Annotated[int, typer.Option(help="an adapter's output is scaled by alpha / rank", min=1)] = 32,
    lr: LearningRate = 3e-3,
    steps: Steps = 100,
    batch: Batch = 4,
    accumulate: Accumulate = 1,
    length: Length = 128,
    save_every: SaveEvery = 50,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Fine-tune MODEL in 4 bits by QA-LoRA, merge the adapters exactly, and write the quantized model to FOLDER.

    A float MODEL is quantized by the recipe first; one that qcompile wrote is taken as it is. FOLDER.training gets
    checkpoints, the adapters in PEFT's form, and the loss of every step as JSON and as a plot.
    """
    from qcompile.training.peft_adapters import peft_config

    check_recipes(recipe)
    fit = Fit(steps, lr, batch, accumulate, 0.3, save_every, seed)
    settings = _settings(model, text, length, fit) | {"recipe": recipe, "rank": rank, "alpha": alpha}
    work = _work_folder(folder, resume, settings)

    def prepare(loaded: Any, tokenizer: Any) -> tuple[nn.Module, str]:
        import torch
        from peft import get_peft_model

        from qcompile.api.quantize import quantize
        from qcompile.modules.quant_linear import QuantLinear

        if not any(isinstance(module, QuantLinear) for module in loaded.modules()):
            tell(quantize(loaded, recipe, calibration_batches(recipe, loaded, tokenizer, text)))
        torch.manual_seed(seed)
        adapted = get_peft_model(loaded, peft_config(loaded, rank, alpha, task_type="CAUSAL_LM"))
        trained, every = adapted.get_nb_trainable_parameters()
        tell(f"{trained:,} parameters of adapters beside {every - trained:,} that stay")
        return adapted, "quantized"

    def settle(adapted: Any) -> nn.Module:
        adapted.save_pretrained(work / "adapter")
        merged: nn.Module = adapted.merge_and_unload()
        return merged

    _train(settings, folder, work, text, fit, prepare, None, settle)


@app.command()
def train(
    model: Model,
    folder: Out,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="q-galore, int4-train, or a .json file")] = "q-galore",
    text: TextFile = None,
    lr: LearningRate = 1e-3,
    steps: Steps = 100,
    batch: Batch = 4,
    accumulate: Accumulate = 1,
    length: Length = 128,
    save_every: SaveEvery = 50,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train MODEL in low precision, settle it, and write the quantized model to FOLDER.

    FOLDER.training gets checkpoints, and the loss of every step as JSON and as a plot.
    """
    from qcompile.pipeline.find_recipe import find_recipe

    check_recipes(recipe)
    chosen = find_recipe(recipe)
    if not chosen.trains:
        raise ValueError(f"recipe {recipe!r} does not train. Fix: qcompile quantize {model} {folder} -r {recipe}")
    fit = Fit(steps, lr, batch, accumulate, 1.0, save_every, seed)
    settings = _settings(model, text, length, fit) | {"recipe": recipe}
    work = _work_folder(folder, resume, settings)

    def prepare(loaded: Any, tokenizer: Any) -> tuple[nn.Module, str]:
        from qcompile.calibration.context_length import within_context
        from qcompile.training.train import train as run

        loaded.requires_grad_(True)
        tell(run(loaded, chosen, rows=batch * within_context(length, loaded, tokenizer)))
        return loaded, "prepared"

    def settle(trained: nn.Module) -> nn.Module:
        from qcompile.training.settle import settle as run

        run(trained)
        return trained

    _train(settings, folder, work, text, fit, prepare, _optimizer(chosen, lr), settle)


def _optimizer(recipe: Any, lr: float) -> Callable[[list[nn.Parameter]], Any] | None:
    """The optimizer that a recipe wants, or None for the usual one."""
    from qcompile.passes import QGaLore
    from qcompile.training.optim import QGaLoreAdamW8bit

    if any(isinstance(config, QGaLore) for config in recipe.passes):
        return lambda parameters: QGaLoreAdamW8bit(parameters, lr=lr)
    return None


def _train(
    settings: dict[str, Any], folder: Path, work: Path, text: Path | None, fit: Fit,
    prepare: Callable[[Any, Any], tuple[nn.Module, str]], make_optimizer: Callable[[list[nn.Parameter]], Any] | None,
    settle: Callable[[nn.Module], nn.Module],
) -> None:  # fmt: skip
    from qcompile.checkpoint.save_load import save

    def say() -> str:
        last = newest_checkpoint(work)
        return f"{folder} was not written" + (f"; {last} is kept, and --resume goes on from it" if last else "")

    with kept(say):
        loaded, tokenizer = load(settings["MODEL"])
        length = cap_length(settings["length"], loaded, tokenizer)
        train_pieces, held_out = _pieces(tokenizer, text, length, fit)
        losses = [("as loaded", held_out_loss(loaded, held_out))]
        model, stage = prepare(loaded, tokenizer)
        losses.append((stage, held_out_loss(model, held_out)))
        with Progress(console=console) as progress:
            task = progress.add_task("training", total=fit.steps)

            def tell_step(step: int, loss: float) -> None:
                progress.update(task, completed=step, description=f"training, loss {loss:.3f}")

            work.mkdir(parents=True, exist_ok=True)
            (work / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
            curve = fit.run(
                model,
                train_pieces,
                work,
                make_optimizer=make_optimizer,
                resume=newest_checkpoint(work) is not None,
                tell_step=tell_step,
            )
        losses.append(("trained", held_out_loss(model, held_out)))
        settled = settle(model)
        losses.append(("settled", held_out_loss(settled, held_out)))
        save(settled, folder, tokenizer)
    table = Table("model", f"held-out loss, nats per token ({_HELD_OUT} windows of {length})")
    for stage, loss in losses:
        table.add_row(stage, f"{loss:.4f}")
    print_table(table)
    write_plot(lambda path: plot_losses(curve, path), work / CURVE)
    tell(f"written: {folder}")


def _pieces(tokenizer: Any, text: Path | None, length: int, fit: Fit) -> tuple[list[Any], list[Any]]:
    """Windows to train on, as many as the run reads and the text has, and held-out ones from the end of the text."""
    from qcompile.calibration.text import read_text, windows

    words = read_text(text)
    there = len(tokenizer(words, verbose=False).input_ids) // length
    if there < 2 * _HELD_OUT:
        raise ValueError(
            f"the text has {there} windows of {length} tokens, and training needs {2 * _HELD_OUT}, of which "
            f"{_HELD_OUT} are held out. Fix: a longer text, or a smaller --length"
        )
    pieces = windows(tokenizer, words, length=length, count=there)
    return pieces[: min(fit.steps * fit.batch * fit.accumulate, there - _HELD_OUT)], pieces[-_HELD_OUT:]


def _settings(model: str, text: Path | None, length: int, fit: Fit) -> dict[str, Any]:
    """What a run is made of, by the names of its options: another run's checkpoint is no beginning of it."""
    return {
        "MODEL": model, "text": None if text is None else str(text), "length": length, "steps": fit.steps, "lr": fit.lr,
        "batch": fit.batch, "accumulate": fit.accumulate, "seed": fit.seed,
    }  # fmt: skip


def _work_folder(folder: Path, resume: bool, settings: dict[str, Any]) -> Path:
    """Where checkpoints go.

    Raises:
        ValueError: another run's checkpoints are there, and nobody asked to go on from them, or with other settings.
    """
    work = folder.with_name(f"{folder.name}.training")
    last, file = newest_checkpoint(work), work / _SETTINGS
    if last is not None and not resume:
        raise ValueError(f"{last} is of an earlier run. Fix: --resume goes on from it; or remove {work}")
    if last is not None:
        before = json.loads(file.read_text()) if file.is_file() else {}
        for name, value in settings.items():
            if before.get(name) != value:
                option = name if name == "MODEL" else f"--{name}"
                raise ValueError(
                    f"{last} is of a run with {option} {before.get(name)}, not {value}. "
                    f"Fix: --resume with the same; or remove {work}"
                )
        return work
    if resume:
        note(f"{work} has no whole checkpoint yet: the run starts from the beginning")
    return work
