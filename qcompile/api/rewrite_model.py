"""Run a recipe on a model and write its result into the model, in place: what `quantize` and `train` have in common.

The model is captured once, without its cache; passes run on that Program; only when everything has succeeded are
folded weights written back and modules replaced. Then the model is called on the first batch and compared with its
rewritten graph, and with the float model (result_check.py). Until that has passed the model is as it was, whatever
happens (an error, Ctrl-C).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.analysis.facts import Facts
from qcompile.api.example_inputs import read_batches
from qcompile.api.model_checks import check_experts
from qcompile.api.result_check import ResultCheck
from qcompile.api.traced_model import TracedModel
from qcompile.api.workspace import Workspace
from qcompile.api.write_back import WriteBack
from qcompile.memory.process import peak_resident_bytes
from qcompile.memory.spilled_weights import SpilledWeights, SpillFolder
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.modules.generation_plan import GenerationPlan
from qcompile.pipeline.run import check_data, run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report

KeepFloat = Callable[[Facts], dict[str, str]]
"""Gives the sites of a captured model that stay as they are, with the reason for the report."""


def rewrite_model(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any] | None,
    *,
    example: Any,
    verify: bool,
    progress: bool,
    dump: str | Path | None,
    keep_float: KeepFloat = lambda _facts: {},
    workspace: Workspace | None = None,
) -> tuple[Report, Recipe]:
    """Rewrite a model in place.

    Args:
        model: checked by `check_model`.
        recipe: what to do.
        batches: calibration data, or None.
        example: what to trace with when there are no batches.
        verify: certify every exact pass on the first batch, and warn of a result that is far from the float model.
        progress: show bars.
        dump: folder for the graph before and after every pass.
        keep_float: sites that stay as they are, beside those of no module.
        workspace: where a model of stored tensors puts what it finished; None: a temporary folder.

    Returns:
        What was done, and the recipe as it ran.

    Raises:
        ValueError: see `quantize`; the model is then unchanged.
    """
    started = time.perf_counter()
    recipe.check()
    check_data(recipe, batches is not None)
    data = None if batches is None else read_batches(batches)
    with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
        traced = TracedModel.of(model, recipe, data, example)
        program, flat = traced.program, traced.flat
        facts = Facts(program)
        calls = GenerationPlan.fit(model, traced.recipe, traced.call.args, traced.call.kwargs, len(facts.attentions))
        check_experts(calls.recipe, facts)
        places = WriteBack.of(model, facts)
        finished, offload = None, None
        if workspace is not None:
            plan = workspace.plan(facts, calls.recipe, flat)
            finished = workspace.begin(model, calls.recipe, flat)
            offload = SpillFolder(finished.spill) if plan.offloads else None
        if any(isinstance(weight, StoredTensor) for weight in program.weights.values()):
            spill = SpillFolder(None if finished is None else finished.spill)
            program.weights = SpilledWeights(program.weights, spill)
        rewritten, report = run(
            program,
            calls.recipe,
            facts=facts,
            batches=(lambda: flat) if data else None,
            example=flat[0] if flat else None,
            verify=verify,
            keep_float=keep_float(facts) | places.not_plain,
            progress=progress,
            dump=dump,
            finished=finished,
            offload=offload,
        )
        writes = places.check(rewritten)
        calls.finish(report)
        before = ResultCheck.before(model, traced, rounds_cache=bool(calls.heads))
        before.apply(writes, rewritten, report)
    calls.attach(model)
    report.passes += traced.dropped
    report.sites += traced.unreached
    report.passes += [calls.skipped] if calls.skipped is not None else []
    report.peak_bytes, report.seconds = peak_resident_bytes(), time.perf_counter() - started
    return report, calls.recipe


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each as it was, and new ones as those in whose place they are."""
    modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    model.eval()
    try:
        yield
    finally:
        for path, module in model.named_modules(remove_duplicate=False):
            while path not in modes:  # inside a new module
                path = path.rpartition(".")[0]
            module.training = modes[path]
