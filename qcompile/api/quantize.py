"""`quantize(model, recipe, batches)`: run a recipe and write its result into the model, in place.

The model is captured once, without its cache; passes run on that Program; only when everything has
succeeded are folded weights written back and linears replaced. Until then the model is as it was,
whatever happens (an error, Ctrl-C).
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.analysis.facts import Facts
from qcompile.api.example_inputs import call_of, flat_inputs, own_example, widen_batch
from qcompile.api.write_back import WriteBack
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture
from qcompile.modules.generation_plan import GenerationPlan, with_own_prefix
from qcompile.pipeline.presets import find_recipe
from qcompile.pipeline.run import check_data, run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report


def quantize(
    model: nn.Module,
    recipe: str | Recipe | dict[str, object] = "int8",
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    verify: bool = True,
    progress: bool = True,
    dump: str | Path | None = None,
) -> Report:
    """Quantize a model in place.

    Args:
        model: any module that traces to one graph; its class, `generate`, `state_dict` and device
            moves stay.
        recipe: preset name (`qcompile recipes`), "auto" (see pipeline/advise.py), Recipe, plain data or path to a
            JSON file.
        batches: calibration data: dicts of keyword arguments, tuples of arguments, or tensors.
            Needed by recipes with statistics; else only the first is used, to trace and to verify.
        example: what to trace with when there are no batches; transformers' models bring their own.
        verify: certify every exact pass on the first batch.
        progress: show bars.
        dump: folder for the graph before and after every pass, as text with diffs: the way to debug a pass.

    Returns:
        What was done, what was skipped and why.

    Raises:
        ValueError: (as RecipeError, CaptureError, CalibrationError, NothingToQuantize) with the
            place and the fix; the model is then unchanged.
    """
    chosen = with_own_prefix(find_recipe(recipe, model, data=batches is not None), model)
    chosen.check()
    check_data(chosen, batches is not None)
    data = list(batches) if batches is not None else None
    if data is not None and not data:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    first = data[0] if data else example if example is not None else own_example(model)
    args, kwargs = call_of(first)
    was_training = model.training
    model.eval()
    try:
        program = capture(model, *widen_batch(args, kwargs))
        facts = Facts(program)
        calls = GenerationPlan.fit(model, chosen, args, kwargs, len(facts.attentions))
        places = WriteBack.of(model, facts)
        flat = [flat_inputs(program, batch, kwargs) for batch in (data or [first])]
        rewritten, report = run(
            program,
            calls.recipe,
            facts=facts,
            batches=(lambda: flat) if data else None,
            example=flat[0],
            verify=verify,
            keep_float=places.not_plain,
            progress=progress,
            dump=dump,
        )
        places.check(rewritten)
        calls.finish(report)
    finally:
        model.train(was_training)
    places.apply(program, rewritten)
    calls.attach(model)
    report.passes += [calls.skipped] if calls.skipped is not None else []
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    object.__setattr__(model, "qcompile_recipe", calls.recipe.to_json())  # an attribute of ours, for `save`
    return report
