"""Stacks of experts that are stored as codes are found by the module that holds them."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example

import qcompile
from qcompile import capture
from qcompile.ir.quantized_stacks import quantized_stacks, stack_site
from qcompile.modules.quant_experts import QuantStack


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_stack_is_found_once_a_read(name):
    model = build(name)
    before = [path for *_, path in quantized_stacks(capture(model, (), example(name)))]
    qcompile.quantize(model, "w4a16-g32", [example(name)], progress=False)
    held = {path for path, module in model.named_modules() if isinstance(module, QuantStack)}
    found = list(quantized_stacks(capture(model, (), example(name))))
    assert before == [] and held and {path for *_, path in found} == held
    for node, call, path in found:
        stack = model.get_submodule(path)
        assert tuple(node.meta["val"].shape) == (*stack.codes.shape[:2], stack.columns)
        assert call.columns == stack.columns
        owner, _, leaf = stack_site(path).rpartition(".")
        assert isinstance(getattr(model.get_submodule(owner), leaf), torch.Tensor)
