"""Property-based testing of a rewriting: a random model, a pass of your own, and the check that both compute the same.

pytest examples/prove_rewriting.py
"""

import torch
from hypothesis import given, settings

import qcompile
from qcompile.testing import assert_equivalent, decoders

aten = torch.ops.aten


def reassociate_scales(program):
    """Write (x * a) * b with numbers a and b as x * (a * b)."""
    for node in list(program.graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
        x, factor = node.args
        inner = isinstance(x, torch.fx.Node) and x.target is aten.mul.Tensor and isinstance(x.args[1], float)
        if inner and isinstance(factor, float):
            node.args = (x.args[0], x.args[1] * factor)
    program.graph.eliminate_dead_code()


@settings(max_examples=5, deadline=None)
@given(decoders())
def test_the_pass_computes_the_same(model):
    """In float64; a wrong pass fails with the first node that differs."""
    before = qcompile.capture(model, (model.example(),)).widened()
    after = before.copy()
    reassociate_scales(after)
    assert_equivalent(before, after, [model.example()])
