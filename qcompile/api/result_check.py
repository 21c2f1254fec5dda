"""The last check of `quantize`: the changed model computes what its rewritten graph does; and its distance from float.

Analyses may be wrong about a model, and a module may read its weights in a way that no graph shows. So the model itself
is called, before and after, on the user's own batch; if it does not compute what was proven, it is restored. A model
without a whole graph has to compute what it does as it came, if each linear gives the result of the new one.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.api.module_snapshot import ModuleSnapshot
from qcompile.api.module_writes import ModuleWrites
from qcompile.api.traced_model import TracedModel
from qcompile.ir.capture import run_as_captured
from qcompile.ir.program import Program
from qcompile.ir.repeated_draws import repeated_draws
from qcompile.numerics.output_distance import ENOUGH_TOKENS, OutputDistance
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.certificate import storage_dtype
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.registry import registered
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError

# Storage dtype -> relative difference that other orders of summation explain, where they flip rounded activations.
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}

_POOR_AGREEMENT = 0.8
_POOR_ERROR = 0.3
_OF_GRAPH = "than its rewritten graph"
_OF_MODULES = "than its own modules with the results of the quantized ones"
_MUCH_NEARER = 0.5  # a difference that is none of the few tokens compared


@dataclass
class ResultCheck:
    """The outputs of the float model on the first batch, to compare with.

    Attributes:
        model: to be changed.
        traced: its graph and call.
        outputs: of the float model.
        logits: which of the outputs are logits; None: none.
        rounds_cache: whether the graph rounds keys and values, which the model does only in calls with a cache.
    """

    model: nn.Module
    traced: TracedModel
    outputs: list[Tensor]
    logits: int | None
    rounds_cache: bool

    @staticmethod
    def before(model: nn.Module, traced: TracedModel, *, rounds_cache: bool) -> ResultCheck:
        """Call the float model, which is in evaluation mode."""
        with repeated_draws():
            return ResultCheck(model, traced, *run_as_captured(model, traced.call), rounds_cache)

    def apply(self, writes: ModuleWrites, rewritten: Program, report: Report) -> None:
        """Write results into the model, call it, and compare; the distance to float goes into the report.

        Args:
            writes: what is to be written.
            rewritten: the graph that the model has to compute then.
            report: gets the distance.

        Raises:
            RecipeError: the model computes something else than the rewritten graph, or does not run; it is restored.
        """
        snapshot = ModuleSnapshot(self.model)
        try:
            whole = bool(self.traced.flat)
            without_graph = None if whole else (self._by_new_modules(writes), self._called())
            writes.apply()
            outputs = self._called()
            expected, again = without_graph or (self._of(rewritten), None)
            wrong = self._difference(expected, outputs)
            # Where two calls of the float model differ as well, nothing can be compared.
            if wrong is not None and self._difference(again or self._of(self.traced.program), self.outputs) is None:
                other = _OF_GRAPH if whole else _OF_MODULES
                raise RecipeError(
                    f"the quantized model gives another output {other} ({wrong}): its code depends on its modules in "
                    "another way than by calling them. It is as it was. Fix: torch.compile(model, backend='qcompile'), "
                    "which replaces no module"
                )
            distance = OutputDistance.between(self.outputs, outputs, self.logits)
            self._warn(distance, report)
        except BaseException:
            snapshot.restore()
            raise
        report.metrics |= distance.metrics()

    def _called(self) -> list[Tensor]:
        with repeated_draws():
            return run_as_captured(self.model, self.traced.call)[0]

    def _of(self, program: Program) -> list[Tensor]:
        with repeated_draws():
            return [value for value in program(*self.traced.flat[0]) if isinstance(value, Tensor)]

    def _by_new_modules(self, writes: ModuleWrites) -> list[Tensor]:
        """What the float model gives where each module that is to be replaced gives the result of the new one."""
        with ExitStack() as hooks:
            for path, new in writes.modules.items():

                def hook(_old: nn.Module, args: Any, kwargs: Any, _result: Any, new: nn.Module = new) -> Any:
                    return new(*args, **kwargs)

                handle = self.model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            return self._called()

    def _difference(self, expected: list[Tensor], outputs: list[Tensor]) -> str | None:
        """How outputs differ from what is expected, as text; None if they do not, or the graph rounds more."""
        if self.rounds_cache:
            return None
        if [value.shape for value in expected] != [value.shape for value in outputs]:
            return "other shapes"
        error = OutputDistance.between(expected, outputs, None).error
        allowed = _TOLERANCE[storage_dtype(self.traced.program)]
        return None if error <= allowed else f"relative difference {error:.2g}"

    def _warn(self, distance: OutputDistance, report: Report) -> None:
        if self.traced.recipe.trains:  # it is the start of a training
            return
        poor = distance.tokens >= ENOUGH_TOKENS and distance.agreement < _POOR_AGREEMENT
        if not poor and distance.error < _POOR_ERROR:
            return
        plain = self._plain_distance(report)
        if plain is not None and plain.size < _MUCH_NEARER * distance.size:
            warnings.warn(
                f"recipe {report.recipe!r} is further from the float model ({distance}) than the same formats without "
                f"its rewritings and searches ({plain}). Fix: use a plain recipe",
                stacklevel=4,
            )
        elif poor:
            warnings.warn(
                f"recipe {report.recipe!r}: the quantized model and the float model agree on {distance.agreement:.0%} "
                f"of {distance.tokens} tokens. Fix: a calibrated recipe or more bits; `qcompile compare` measures them",
                stacklevel=4,
            )

    def _plain_distance(self, report: Report) -> OutputDistance | None:
        """The distance of round to nearest in the recipe's formats; None where the recipe is that itself."""
        recipe = self.traced.recipe
        config = next((c for c in recipe.passes if isinstance(c, Quantize)), None)
        rewrote = any(entry.exact for entry in (registered()[type(c)] for c in recipe.passes))
        if config is None or not self.traced.flat or not (rewrote or type(config) is not Quantize):
            return None
        plain = Quantize(config.weight, config.act, config.lm_head, config.lm_head_act)
        kept = {site.name: site.reason for site in report.sites if not site.quantized}
        program, _ = run(
            self.traced.program, Recipe("plain", (plain, Fuse()), recipe.rules), keep_float=kept, verify=False
        )
        return OutputDistance.between(self.outputs, self._of(program), self.logits)
