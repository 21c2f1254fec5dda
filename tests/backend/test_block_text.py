"""Texts are equal for calls that compute the same, and for no others."""

from __future__ import annotations

import torch
from layer_stacks import captured
from torch import nn

from qcompile.backend.block_text import PartReader, call_text, is_leaf, is_size


class Two(nn.Module):
    """Twice the same function of other values, and a third that swaps its operands."""

    def forward(self, x, y):
        a, b = torch.tanh(x), torch.tanh(x + 1)
        return (a - y) * 2, (b - y) * 2, (y - b) * 2, (a - y) * 2.5


def test_references_are_places():
    program = captured(Two())
    leaves = [node for node in program.graph.nodes if is_leaf(node)]
    subtractions = [node for node in program.graph.nodes if str(node.target) == "aten.sub.Tensor"]
    texts = [PartReader(leaves, own_sizes=False).read([node, next(iter(node.users))]).text for node in subtractions]
    same, again, swapped, scaled = texts[0], *texts[1:4]
    assert same == again and scaled != same
    assert swapped != same


def test_a_word_is_no_reference():
    program = captured(Two())
    node = next(node for node in program.graph.nodes if str(node.target) == "aten.sub.Tensor")
    named = call_text(node, lambda source: "n")
    node.args = ("n", node.args[1])
    assert call_text(node, lambda source: "n") != named


def test_sizes_are_no_values():
    program = captured(Two())
    assert not any(is_size(node) for node in program.graph.nodes if node.op == "call_function")
