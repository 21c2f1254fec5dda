"""What `quantize` works on: the Program of a model, its flat inputs, and the call that it was traced with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qcompile.api.example_inputs import call_of, trace_batches
from qcompile.api.linear_leaves import capture_leaves, without_whole_graph
from qcompile.api.model_example import own_examples
from qcompile.ir.call_tree import CallTree
from qcompile.ir.program import Program
from qcompile.ir.trace_failure import CaptureError, NotRunnable
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import PassReport, SiteReport


@dataclass(frozen=True)
class TracedModel:
    """A model's graph, whole, or of its linear modules side by side where it cannot be one.

    Attributes:
        program: the graph.
        call: the first batch, or the example.
        flat: the batches as inputs of the program; empty where the program is of single modules.
        recipe: what can run on the program.
        dropped: a report on every pass that cannot.
        unreached: a report on every linear module that is not in the program.
    """

    program: Program
    call: CallTree
    flat: list[list[Tensor]]
    recipe: Recipe
    dropped: list[PassReport] = field(default_factory=list)
    unreached: list[SiteReport] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module, recipe: Recipe, batches: Sequence[Any] | None, example: Any) -> TracedModel:
        """Trace a model.

        Args:
            model: in evaluation mode.
            recipe: to be run.
            batches: calibration data, or None.
            example: to trace with where there are no batches; None: the model's own.

        Raises:
            CaptureError: there is no whole graph and the recipe needs one, or the model does not run.
            CalibrationError: a batch that is not like the first.
            RecipeError: no example.
        """
        names = [f"batch {number}" for number in range(1, len(batches) + 1)] if batches else ["the example"]
        given = list(batches or ([example] if example is not None else []))
        first: CallTree | None = None
        failure: CaptureError | None = None
        for data in [given] if given else ([own] for own in own_examples(model)):
            call = CallTree.of(*call_of(data[0], model, names[0]), model)
            try:
                program, flat = trace_batches(model, data, names)
                return TracedModel(program, call, flat, recipe, [], _unreached(model, program))
            except NotRunnable:
                raise
            except CaptureError as error:
                first, failure = first or call, failure or error
        assert first is not None and failure is not None  # `own_examples` raises where it gives none
        part, dropped = without_whole_graph(recipe, failure)
        program, unreached = capture_leaves(model, first, failure)
        return TracedModel(program, first, [], part, dropped, unreached)


def _unreached(model: nn.Module, program: Program) -> list[SiteReport]:
    """Linear modules whose weight no part of the graph reads, as those for images where the example is text."""
    known = {*program.weights, *(name for others in program.aliases.values() for name in others)}
    found = []
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if type(module) is nn.Linear and path and name not in known:
            n, k = module.weight.shape
            reason = "the example does not reach it. Fix: give one that does, as example= or in batches"
            size = module.weight.nbytes
            found.append(SiteReport(name, n, k, reason=reason, bytes_before=size, bytes_after=size))
    return found
