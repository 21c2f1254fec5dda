"""`quantize(model, recipe, batches)`: run a recipe and write its result into the model, in place.

The model is captured once, without its cache; passes run on that Program; only when everything has
succeeded are folded weights written back and linears replaced. Then the model is called on the first
batch and compared with its rewritten graph, and with the float model (result_check.py). Until that
has passed the model is as it was, whatever happens (an error, Ctrl-C).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.analysis.facts import Facts
from qcompile.api.example_inputs import read_batches
from qcompile.api.model_checks import check_model
from qcompile.api.model_wrappers import inner_model
from qcompile.api.result_check import ResultCheck
from qcompile.api.traced_model import TracedModel
from qcompile.api.write_back import WriteBack
from qcompile.checkpoint.foreign_save import forbid_save_pretrained
from qcompile.memory.process import peak_resident_bytes
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
        model: any module; its class, `generate`, `state_dict` and device
            moves stay. Of a model wrapped by torch.compile, DataParallel or adapters the inner one is quantized.
        recipe: preset name (`qcompile recipes`), "auto" (see pipeline/advise.py), Recipe, plain data or path to a
            JSON file.
        batches: calibration data: dicts of keyword arguments, tuples of arguments, or tensors; arrays and lists of
            integers become tensors. Needed by recipes with statistics; else only the first is used, to trace and to
            verify. Read once.
        example: what to trace with when there are no batches; transformers' models bring their own.
        verify: certify every exact pass on the first batch.
        progress: show bars.
        dump: folder for the graph before and after every pass, as text with diffs: the way to debug a pass.

    Returns:
        What was done, what was skipped and why; its metrics hold the distance from the float model on the first batch.

    Warns:
        UserWarning: an exact pass that broke its law and was undone; a result that is far from the float model.

    Raises:
        ValueError: (as RecipeError, CaptureError, CalibrationError, NothingToQuantize) with the
            place and the fix; the model is then unchanged.
    """
    model = inner_model(model)
    check_model(model)
    chosen = with_own_prefix(find_recipe(recipe, model, data=batches is not None), model)
    chosen.check()
    check_data(chosen, batches is not None)
    data = None if batches is None else read_batches(batches)
    with _evaluation_mode(model):
        traced = TracedModel.of(model, chosen, data, example)
        program, flat = traced.program, traced.flat
        facts = Facts(program)
        calls = GenerationPlan.fit(model, traced.recipe, traced.call.args, traced.call.kwargs, len(facts.attentions))
        places = WriteBack.of(model, facts)
        rewritten, report = run(
            program,
            calls.recipe,
            facts=facts,
            batches=(lambda: flat) if data else None,
            example=flat[0] if flat else None,
            verify=verify,
            keep_float=places.not_plain,
            progress=progress,
            dump=dump,
        )
        writes = places.check(rewritten)
        calls.finish(report)
        before = ResultCheck.before(model, traced, rounds_cache=bool(calls.heads))
        before.apply(writes, rewritten, report)
    calls.attach(model)
    report.passes += traced.dropped
    report.sites += traced.unreached
    report.passes += [calls.skipped] if calls.skipped is not None else []
    report.peak_bytes = peak_resident_bytes()
    object.__setattr__(model, "qcompile_recipe", calls.recipe.to_json())  # an attribute of ours, for `save`
    forbid_save_pretrained(model)
    return report


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each as it was, and new ones as the model."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])
