"""Options of the backend are checked before anything is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.backend.inductor import GRAPHS
from qcompile.backend.options import OPTIONS, Options
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError, Rule


def mlp():
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"recipie": "int8"}, "unknown option 'recipie'.*recipe: preset"),
        ({"recipe": "int9"}, "unknown recipe 'int9'; known"),
        ({"recipe": "int8-smooth"}, "needs calibration data for SmoothQuant"),
        ({"on_slow_kernel": "maybe"}, "use 'keep_float' or 'quantize'"),
        ({"rows": 0}, "at least 1"),
        ({"compile_blocks": "no"}, "is no bool. Fix: give True or False"),
        ({"rules": [{"match": "nothing.*", "keep": True}]}, "matches no site; nearest"),
    ],
)
def test_bad_options(options, words):
    torch._dynamo.utils.counters.clear()
    with pytest.raises(Exception, match=f"(?s){words}") as caught, torch.no_grad():
        torch.compile(mlp(), backend="qcompile", options=options)(torch.randn(2, 128))
    assert isinstance(caught.value, RecipeError) or "RecipeError" in str(caught.value)


def test_defaults():
    options = Options.read(None)
    assert (options.recipe.name, options.rules, options.verify, options.on_slow_kernel) == (
        "int8",
        (),
        True,
        "keep_float",
    )
    assert (options.rows, options.inductor, options.dump, options.compile_blocks) == (None, {}, None, True)


def test_every_option_is_described_and_read(tmp_path):
    recipe = Recipe("mine", (Quantize(Format("int8"), None), Fuse()))
    given = dict(
        recipe=recipe, rules=[Rule("a.*", keep=True), {"match": "b.*", "act": "int8"}], verify=False, rows=8,
        on_slow_kernel="quantize", mode="reduce-overhead", inductor={"max_autotune": True}, dump=str(tmp_path),
        compile_blocks=False,
    )  # fmt: skip
    assert set(given) == set(OPTIONS)
    options = Options.read(given)
    assert options.recipe is recipe and options.rules == (Rule("a.*", keep=True), Rule("b.*", act=Format("int8")))
    assert (options.verify, options.on_slow_kernel, options.rows, options.dump) == (False, "quantize", 8, str(tmp_path))
    assert options.inductor == {GRAPHS: True, "max_autotune": True} and not options.compile_blocks


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "8"])
def test_rows_are_a_count(rows):
    with pytest.raises(RecipeError, match="no integer of at least 1"):
        Options.read({"rows": rows})


def test_modes_are_those_of_inductor():
    with pytest.raises(RecipeError, match="'max-autotune' is unknown. Fix: use 'default' or 'reduce-overhead'"):
        Options.read({"mode": "max-autotune"})
