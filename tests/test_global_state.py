"""The global random generators of torch, numpy and Python are the user's: no call of ours draws from them."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from zoo import build, example

import qcompile


def states():
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


@contextmanager
def no_draw():
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    python, array, tensor = states()
    yield
    now = states()
    assert now[0] == python, "random"
    assert all(np.array_equal(a, b) for a, b in zip(array, now[1], strict=True)), "numpy.random"
    assert torch.equal(tensor, now[2]), "torch"


def test_a_draw_is_noticed():
    for draw in (random.random, np.random.rand, lambda: torch.rand(1), lambda: torch.manual_seed(0)):
        with pytest.raises(AssertionError), no_draw():
            draw()


@pytest.mark.parametrize(
    "recipe",
    [
        "int8",
        "int8-rotated",
        "w4a16-awq",
        pytest.param("w4a16-smooth", marks=pytest.mark.slow),
        pytest.param("w4a16-lorc", marks=pytest.mark.slow),
        pytest.param("w4a8-dgq", marks=pytest.mark.slow),
        pytest.param("w4a4-rrs", marks=pytest.mark.slow),
        pytest.param("w4a4-spinquant", marks=pytest.mark.slow),
        pytest.param("fp8-principal", marks=pytest.mark.slow),
    ],
)
def test_quantizing(recipe):
    model, data = build("llama"), [example("llama")]
    with no_draw():
        qcompile.quantize(model, recipe, data if qcompile.find_recipe(recipe).needs else None, progress=False)


def test_verifying():
    model, data = build("llama"), example("llama")
    with no_draw():
        qcompile.verify_model(model, data)


@pytest.mark.slow
def test_saving_and_loading(tmp_path):
    model = build("llama")
    qcompile.quantize(model, "int8", progress=False)
    with no_draw():
        qcompile.save(model, tmp_path / "m")
        qcompile.load(tmp_path / "m")


@pytest.mark.slow
def test_exporting(tmp_path):
    model = build("llama")
    with no_draw():
        qcompile.export_onnx(model, tmp_path / "o", "int8", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "w4a4-rotated"])
def test_compiling(recipe):
    model, data = build("llama"), example("llama")
    compiled = torch.compile(model, backend="qcompile", options={"recipe": recipe})
    with no_draw(), torch.no_grad():
        compiled(**data)
