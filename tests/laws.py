"""Passes on random decoders, for the tests of the passes' laws."""

from __future__ import annotations

import torch
from torch import nn

from qcompile.calibration.statistics import Statistics, observe
from qcompile.ir.capture import capture
from qcompile.recipe.certificate import first_difference
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import registered
from qcompile.testing import Shape, assert_equivalent


def shape(**changes):
    """The shape of a small decoder with grouped heads, gates and biases, and with these changes."""
    small = dict(
        width=16, heads=4, kv_heads=2, head=8, inner=24, layers=2, norm="rms", gated=True, bias=True,
        tied=False, post_norm=False, seed=0,
    )  # fmt: skip
    return Shape(**{**small, **changes})


def rewrite(program, *configs, batches):
    """Run passes in place, one after another, each with the statistics that it needs; returns their reports."""
    reports = []
    for config in configs:
        entry = registered()[type(config)]
        needs = {"absmax", "keys"} & set(entry.needs(config))
        statistics = observe(program, batches) if needs else Statistics()
        context = PassContext.of(program, batches=lambda: batches, statistics=statistics)
        reports.append(entry.run(program, config, context))
        program.cleanup()
    return reports


def before_and_after(model, *configs):
    """The decoder's program in float64, the same after passes, an example input, and the passes' reports."""
    ids = model.example()
    before = capture(model, (ids,)).widened()
    after = before.copy()
    return before, after, ids, rewrite(after, *configs, batches=[[ids]])


def rewritten(model, *configs, x):
    """Passes on any model, checked: the output stays, and nothing changes but what the reports name.

    Returns:
        The program before, the program after and the reports.
    """
    before = capture(model.double().requires_grad_(False), (x,), dynamic=False)
    after = before.copy()
    reports = rewrite(after, *configs, batches=[[x]])
    assert_equivalent(before, after, [x])
    changed = set[str]().union(*(report.changed for report in reports))
    assert first_difference(before, after, [x], changed) == "the output"
    return before, after, reports


def assert_rounded_once(model, config, dtype=torch.bfloat16):
    """Assert that a pass computes weights in float64 and rounds them to the model's dtype once, at the end."""
    ids = model.example()
    narrow = capture(model.to(dtype), (ids,))
    entry = registered()[type(config)]
    statistics = observe(narrow, [[ids]]) if {"absmax", "keys"} & set(entry.needs(config)) else Statistics()
    wide = narrow.widened()
    before = dict(narrow.weights)
    for program in (narrow, wide):
        assert entry.run(program, config, PassContext.of(program, statistics=statistics)).done
    assert any(before.get(name) is not tensor for name, tensor in narrow.weights.items())
    for name, tensor in narrow.weights.items():
        assert name not in before or tensor.dtype == before[name].dtype == dtype, name
        assert torch.equal(tensor, wide.weights[name].to(tensor.dtype)), name


class UsedTwice(nn.Module):
    """A linear that a norm feeds and that something else is multiplied by, too."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.norm(x)), self.linear(x)


class FirstTokenLate(nn.Module):
    """The first token is cut before the second, and read after it."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = self.norm(x)
        first, second = y[:, 0], y[:, 1]
        late = self.c(torch.relu(self.b(second)))
        return self.a(first) + late
