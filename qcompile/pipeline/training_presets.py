"""Recipes for `qcompile.train`, by name, each with its source; `qcompile recipes` lists them too."""

from __future__ import annotations

from qcompile.passes import FixedPoint, QGaLore
from qcompile.recipe.recipe import Recipe

_RECIPES: tuple[Recipe, ...] = (
    Recipe("int4-train", (FixedPoint(),), source="arXiv:2407.12637, W4A4G4; alpha by benches/int4_training.py"),
    Recipe("q-galore", (QGaLore(),), source="Q-GaLore, arXiv:2407.08296; the rank of its 60M model"),
)

TRAINING_PRESETS: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
