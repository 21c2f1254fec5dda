"""`qcompile verify`: every exact pass on the user's own model, in float64, with its certificate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qcompile.api.example_inputs import trace_batches
from qcompile.api.model_wrappers import inner_model
from qcompile.ir.program import Program
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.pipeline.run import run
from qcompile.recipe.certificate import widen
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.registry import registered
from qcompile.recipe.report import Report


def exact_part(recipe: Recipe) -> Recipe:
    """Only the passes of a recipe that must keep the output."""
    passes = tuple(c for c in recipe.passes if registered()[type(c)].exact)
    return Recipe(f"{recipe.name} (exact passes)", passes, (), recipe.source)


def verify_model(model: nn.Module, batch: Any, recipe: str | Recipe = "exact") -> Report:
    """Certify the exact passes of a recipe in float64 (law: relative difference <= 1e-9).

    Args:
        model: not changed.
        batch: one batch, as for `quantize`.
        recipe: a preset name, a JSON file or a Recipe; its exact passes run.

    Returns:
        A report whose `certificates` hold one entry per pass that rewrote something.

    Raises:
        RecipeError: an unknown recipe.
        CalibrationError: a batch that is text, or lists of which no tensor can be made.
        CaptureError: no graph can be had of the model.
    """
    program, (flat,) = trace_batches(inner_model(model), [batch], ("the batch",))
    return verify_program(program, flat, recipe)


def verify_program(program: Program, inputs: Sequence[Any], recipe: str | Recipe = "exact") -> Report:
    """As `verify_model`, for a Program and its flat inputs."""
    wide = widen(inputs, torch.float64)
    _, report = run(program.widened(), exact_part(find_recipe(recipe)), batches=lambda: [wide], example=wide)
    return report
