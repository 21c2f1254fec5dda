"""`train(model, recipe)`: prepare a model for training in low precision, in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.analysis.conv_sites import find_conv_sites
from qcompile.analysis.facts import Facts
from qcompile.api.model_checks import check_model
from qcompile.api.model_wrappers import inner_model
from qcompile.api.rewrite_model import rewrite_model
from qcompile.checkpoint.training_folder import mark_training_folders
from qcompile.codegen.cpu.training_kernels import install_cpu_rounding
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError
from qcompile.training.settle import check_not_in_training


def train(
    model: nn.Module,
    recipe: str | Recipe | dict[str, object],
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    progress: bool = True,
    dump: str | Path | None = None,
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

    Returns:
        What was done, what was skipped and why.

    Raises:
        ValueError: (as RecipeError, CaptureError, CalibrationError, NothingToQuantize) a recipe that does not train, a
            model that is in training already, or of which nothing can be trained. The model is then unchanged.
    """
    model = inner_model(model)
    check_model(model)
    chosen = find_recipe(recipe, model)
    if not chosen.trains:
        raise RecipeError(f"recipe {chosen.name!r} does not train. Fix: qcompile.quantize(model, {chosen.name!r})")
    check_not_in_training(model)
    report, ran = rewrite_model(
        model,
        chosen,
        batches,
        example=example,
        verify=True,
        progress=progress,
        dump=dump,
        keep_float=lambda facts: _frozen(model, facts),
    )
    object.__setattr__(model, "qcompile_recipe", ran.to_json())
    mark_training_folders(model)
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        install_cpu_rounding()
    return report


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
