"""`train(model, recipe)`: prepare a model for training in low precision, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from qcompile.analysis.conv_sites import find_conv_sites
from qcompile.analysis.facts import Facts
from qcompile.api.model_checks import check_model
from qcompile.api.model_wrappers import inner_model
from qcompile.api.rewrite_model import rewrite_model
from qcompile.backend.rounding_kernels import install_rounding
from qcompile.backend.training_speed import TrainingSpeed, report_speeds, slower_sites, some, training_speeds
from qcompile.checkpoint.training_folder import mark_training_folders
from qcompile.passes import FixedPoint
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError
from qcompile.training.settle import check_not_in_training

SHARD_LATER = "prepare the whole model, then shard it, then make the optimizer"

OnSlowKernel = Literal["quantize", "keep_float"]

_NOT_COMPARED = (
    "speed was not compared with float: the model's own example is no batch of the training. Fix: give batches, "
    "example, or rows (batch x tokens)"
)


def train(
    model: nn.Module,
    recipe: str | Recipe | dict[str, object],
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    progress: bool = True,
    dump: str | Path | None = None,
    on_slow_kernel: OnSlowKernel = "quantize",
    rows: int | None = None,
) -> Report:
    """Prepare a model for training in low precision, in place.

    Sites are found by dataflow on the captured graph, as `quantize` finds them. Make the optimizer afterwards, from the
    parameters that the model has then. `settle` ends the training.

    Args:
        model: any module with parameters that require gradients.
        recipe: "int4-train", "q-galore", a Recipe of passes that train, plain data, or path to a JSON file.
        batches: data; the first finds the sites, and INT4 training takes the ranges of activations from all.
        example: what to trace with when there are no batches; transformers' models bring their own.
        progress: show bars.
        dump: folder for the graph before and after every pass.
        on_slow_kernel: "quantize": a site of INT4 training trains in 4 bits also where that takes longer than float;
            the report and one warning name these sites. "keep_float": they stay float. The default differs from the
            backend's: who calls this asks for 4 bits, often not for speed but to train the model that will run, and a
            site that stayed float would settle as float.
        rows: rows of x (batch x tokens) at which linears are compared with float; None: those of the first batch or of
            the example. Convolutions are compared at their size there.

    Returns:
        What was done, what was skipped and why.

    Raises:
        ValueError: (as RecipeError, CaptureError, CalibrationError, NothingToQuantize) a recipe that does not train, a
            model that is in training already, or of which nothing can be trained; "keep_float" where no size of a batch
            is known. The model is then unchanged.

    Warns:
        UserWarning: sites train slower than in float.
    """
    model = inner_model(model, SHARD_LATER)
    check_model(model)
    chosen = find_recipe(recipe, model)
    if not chosen.trains:
        raise RecipeError(f"recipe {chosen.name!r} does not train. Fix: qcompile.quantize(model, {chosen.name!r})")
    check_not_in_training(model)
    is_sized = batches is not None or example is not None or rows is not None
    _check_slow_kernel(chosen, on_slow_kernel, rows, is_sized)
    speeds: dict[str, TrainingSpeed] = {}

    def kept(facts: Facts) -> dict[str, str]:
        speeds.update(training_speeds(facts, chosen, rows) if is_sized else {})
        slow = slower_sites(speeds, "on_slow_kernel='quantize'") if on_slow_kernel == "keep_float" else {}
        return slow | _frozen(model, facts)

    report, ran = rewrite_model(
        model,
        chosen,
        batches,
        example=example,
        verify=True,
        progress=progress,
        dump=dump,
        keep_float=kept,
    )
    _tell_speeds(report, speeds, is_sized)
    object.__setattr__(model, "qcompile_recipe", ran.to_json())
    mark_training_folders(model)
    install_rounding(model.parameters())
    return report


def _check_slow_kernel(recipe: Recipe, on_slow_kernel: str, rows: int | None, is_sized: bool) -> None:
    if on_slow_kernel not in ("quantize", "keep_float"):
        raise RecipeError(f"on_slow_kernel={on_slow_kernel!r} is unknown. Fix: use 'quantize' or 'keep_float'")
    if rows is not None and (type(rows) is not int or rows < 1):
        raise RecipeError(f"rows={rows!r} is no integer of at least 1. Fix: give batch x tokens")
    trains_in_integers = any(isinstance(config, FixedPoint) for config in recipe.passes)
    if on_slow_kernel == "keep_float" and trains_in_integers and not is_sized:
        raise RecipeError(f"on_slow_kernel='keep_float': {_NOT_COMPARED}")


def _tell_speeds(report: Report, speeds: dict[str, TrainingSpeed], is_sized: bool) -> None:
    """Write speeds into the report, and warn of sites that are slower than float."""
    slower = report_speeds(report, speeds)
    if not is_sized:
        for entry in report.passes:
            entry.notes += [_NOT_COMPARED] if entry.name == "FixedPoint" else []
    if slower:
        warnings.warn(
            f"qcompile: {len(slower)} sites train slower than in float: {some(slower)}; the report has all. Fix: "
            "larger batches, or on_slow_kernel='keep_float', which leaves them float",
            stacklevel=3,
        )


def _frozen(model: nn.Module, facts: Facts) -> dict[str, str]:
    """Sites whose weight needs no gradient, with the reason why they stay as they are."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    reasons = {}
    names = [site.name for site in facts.sites] + [site.name for site in find_conv_sites(facts.program)]
    for name in names:
        weight = parameters.get(name)
        if weight is None or not weight.requires_grad:
            reasons[name] = "requires_grad of its weight is off: nothing to train"
    return reasons
