"""Passes on random decoders, for the tests of the passes' laws."""

from __future__ import annotations

from qcompile.calibration.statistics import Statistics, observe
from qcompile.ir.capture import capture
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import registered
from qcompile.testing import Shape


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
