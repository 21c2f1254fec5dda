"""`quantize(model, recipe, batches)`: run a recipe and write its result into the model, in place.

The model is captured once, without its cache; passes run on that Program; only when everything has
succeeded are folded weights written back and linears replaced. Until then the model is as it was,
whatever happens (an error, Ctrl-C).
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qcompile.analysis.attention_scores import products
from qcompile.api.example_inputs import _own_example, call_of, flat_inputs, widen_batch
from qcompile.api.write_back import _Plan
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture
from qcompile.modules.generation_hooks import attach, fit_cache, make_constants, make_prefix, resolve
from qcompile.pipeline.presets import find_recipe
from qcompile.pipeline.run import check_data, run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report

ops = torch.ops.qcompile
aten = torch.ops.aten


def quantize(
    model: nn.Module,
    recipe: str | Recipe | dict[str, object] = "int8",
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    verify: bool = True,
    progress: bool = True,
) -> Report:
    """Quantize a model in place.

    Args:
        model: any module that traces to one graph; its class, `generate`, `state_dict` and device
            moves stay.
        recipe: preset name (`qcompile recipes`), "auto" (see advise.py), Recipe, plain data or path to a JSON file.
        batches: calibration data: dicts of keyword arguments, tuples of arguments, or tensors.
            Needed by recipes with statistics; else only the first is used, to trace and to verify.
        example: what to trace with when there are no batches; transformers' models bring their own.
        verify: certify every exact pass on the first batch.
        progress: show bars.

    Returns:
        What was done, what was left and why.

    Raises:
        ValueError: (as RecipeError, CaptureError, CalibrationError, NothingToQuantize) with the
            place and the mend; the model is then unchanged.
    """
    config = resolve(find_recipe(recipe, model, data=batches is not None), model)
    config.check()
    check_data(config, batches is not None)
    held = list(batches) if batches is not None else None
    if held is not None and not held:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    first = held[0] if held else example if example is not None else _own_example(model)
    args, kwargs = call_of(first)
    was_training = model.training
    model.eval()
    try:
        program = capture(model, *widen_batch(args, kwargs))
        config, heads, left_out = fit_cache(model, config, args, kwargs, len(products(program)))
        plan = _Plan.of(model, program)
        flat = [flat_inputs(program, batch, kwargs) for batch in (held or [first])]
        rewritten, report = run(
            program,
            config,
            batches=(lambda: flat) if held else None,
            example=flat[0],
            verify=verify,
            keep=plan.not_plain,
            progress=progress,
        )
        plan.check(program, rewritten)
        prefix, constants = make_prefix(config, report.made, heads), make_constants(report.made, heads)
    finally:
        model.train(was_training)
    plan.apply(program, rewritten)
    attach(model, config, prefix, constants)
    report.passes += [left_out] if left_out is not None else []
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.qcompile_recipe = config.to_json()
    return report
