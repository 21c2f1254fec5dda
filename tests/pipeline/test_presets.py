"""Every preset on every architecture: certified where it is exact, every site quantized or skipped for a reason."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from zoo import ZOO, brief, build, example, is_dynamic

from qcompile.ir.capture import capture
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.presets import PRESETS
from qcompile.pipeline.run import run
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError

# Relative error of random tiny models, whose 64 channels are one ragged group, by what the preset keeps.
BOUNDS = {
    "w4a4": 1.5,
    "int4": 0.6,
    "fp4": 0.6,
    "w4": 0.6,
    "kv4": 0.3,
    "kv8": 0.02,
    "int8": 0.05,
    "w8": 0.03,
    "fp8": 0.15,
    "serve-w4": 0.6,
    "serve-int8": 0.05,
    "serve-fp8": 0.15,
    "gguf-q8": 0.03,
    "gguf-q4": 0.6,
}


@functools.lru_cache(maxsize=1)
def captured(name):
    inputs = example(name)
    return capture(build(name), (), inputs, dynamic=is_dynamic(name)), list(inputs.values())


# Of the others each has the dataflow of one of these.
IN_CI = {"llama", "gpt2", "gemma3", "mixtral", "qwen2_moe", "bert", "vit", "mlp"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in IN_CI else pytest.mark.exhaustive) for n in ZOO]
)
def test_presets(name):
    program, inputs = captured(name)
    want = program(*inputs)[:1]
    for recipe in PRESETS.values():
        start = time.time()
        before = dict(program.weights)
        try:
            quantized, report = run(program, brief(recipe), batches=lambda: [inputs, inputs], example=inputs)
        except RecipeError as refused:  # matrices narrower than the coarsest group cannot be had for that few bits
            assert recipe.name == "w4a16-finequant" and "already take" in str(refused)
            continue
        assert all(c.holds for c in report.certificates), (recipe.name, report)
        assert all(place.reason for p in report.passes for place in p.skipped), recipe.name
        if any(isinstance(c, Quantize) for c in recipe.passes):
            others = [s.reason for s in report.sites if not s.quantized]
            known = "expert", "convolution", "which stay float (keep_lm_head)"
            assert all(any(word in reason for word in known) for reason in others), (recipe.name, others)
        bound = next((b for start_, b in BOUNDS.items() if recipe.name.startswith(start_)), 1e-3)
        error = relative_error(quantized(*inputs)[:1], want)
        assert error < bound, (recipe.name, error)
        assert all(program.weights[n] is t for n, t in before.items()), "the program was touched"
        print(name, recipe.name, f"{time.time() - start:.1f} s", f"{error:.3f}")


def test_the_list_is_consistent():
    for name, recipe in PRESETS.items():
        recipe.check()
        assert recipe.name == name and recipe.source
        assert Recipe.from_json(recipe.to_json()) == recipe
    assert torch.is_tensor(captured("mlp")[1][0])


def test_what_quantizes_is_fused():
    for recipe in PRESETS.values():
        kinds = [type(config) for config in recipe.passes]
        assert any(issubclass(kind, Quantize) for kind in kinds) == (Fuse in kinds), recipe.name
        assert Fuse not in kinds[:-1]
