"""What kernels read of a site: made once for equal weights, added once to a program."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qcompile.codegen.prepared_weights import prepared_weights, stored_weight
from qcompile.ir.capture import capture
from qcompile.ir.op_calls import QLinearCall
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe


@pytest.fixture
def site():
    """A program with one site, and its call."""
    form, x = Format.parse("int4/group32/zero"), torch.randn(5, 64)
    recipe = Recipe("one", (Quantize(form, None, lm_head=form), Fuse()))
    program, _ = run(capture(torch.nn.Linear(64, 24), (x,)), recipe, verify=False)
    ((_, call),) = QLinearCall.find(program)
    return program, call


def test_the_stored_weight_is_that_of_the_call(site):
    program, call = site
    codes, scale, zero, group_scale = stored_weight(program, call)
    assert codes.shape == (24, 32) and scale.shape == zero.shape == (24, 2) and group_scale is None


def test_prepared_tensors_are_added_once(site):
    program, call = site
    sources = []

    def remember(layout, tensors, make):
        sources.append(tensors)
        return make()

    def make():
        return torch.zeros(3), None, torch.ones(2)

    first = prepared_weights(program, [call], "packed", remember, make)
    second = prepared_weights(program, [call], "packed", remember, make)
    assert first == second and [program.weight_of(node).shape for node in first] == [(3,), (2,)]
    assert all(program.weight_name(node).endswith(f".packed.{i}") for i, node in enumerate(first))
    assert len(sources[0]) == 3  # without the group scale, which the format does not have


def test_codes_that_are_computed_are_named(site):
    program, call = site
    computed = program.insert(torch.ops.aten.clone.default, (call.weight,), after=call.weight)
    with pytest.raises(KeyError, match="not the placeholder of a weight"):
        stored_weight(program, dataclasses.replace(call, weight=computed))
