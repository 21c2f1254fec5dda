"""`qa_lora(model)`: adapters for a quantized model, which merge into it exactly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.api.model_checks import check_model
from qcompile.api.model_wrappers import inner_model
from qcompile.api.rewrite_model import evaluation_mode, rewrite_model
from qcompile.api.traced_model import TracedModel
from qcompile.checkpoint.training_folder import mark_training_folders
from qcompile.modules.adapted_linear import AdaptedLinear
from qcompile.modules.adapted_stack import AdaptedStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.passes import QALoRA
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import Rule
from qcompile.training.settle import check_not_in_training
from qcompile.training.train import SHARD_LATER


def qa_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    *,
    rules: Iterable[Rule] = (),
    example: Any = None,
    seed: int = 0,
    dump: str | Path | None = None,
) -> Report:
    """Add QA-LoRA adapters (arXiv:2309.14717) to a quantized model, in place.

    An adapter reads the mean of each group of channels, so that `settle` can merge it into the zero points of the
    weight: nothing is rounded again, and no adapter is left. Only adapters are trainable afterwards: every other
    parameter's `requires_grad` is off. The paper's learning rate is 2e-4 with rank 64; for short runs on small models
    3e-3 did well here (docs/algorithms/qa-lora.md).

    Args:
        model: quantized by `qcompile.quantize` in a format with groups (w4a16, w4a16-g32, w4a16-gptq, ..).
        rank: of the adapters.
        alpha: an adapter's output is scaled by alpha / rank.
        rules: `Rule(match, keep=True)` keeps products without an adapter.
        example: what to trace with; transformers' models bring their own.
        seed: of the draws of A.
        dump: folder for the graph before and after.

    Returns:
        What got an adapter, what did not and why.

    Raises:
        ValueError: (as RecipeError, CaptureError) no product that can have an adapter, a rank larger than a weight, a
            model that is in training already. The model is then unchanged.
    """
    model = inner_model(model, SHARD_LATER)
    check_not_in_training(model)
    check_model(model)
    recipe = _recipe(rank, alpha, seed, rules)
    report, _ = rewrite_model(model, recipe, None, example=example, verify=True, progress=False, dump=dump)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (AdaptedLinear, AdaptedStack)):
            module.lora_a.requires_grad_(True)
            module.lora_b.requires_grad_(True)
    mark_training_folders(model)
    return report


def adapted_names(model: nn.Module, rank: int, alpha: float, example: Any = None) -> list[str]:
    """The paths of the linears that `qa_lora` would give an adapter; stacks of experts are no modules to PEFT.

    Args:
        model: not changed.
        rank: of the adapters.
        alpha: as of `qa_lora`.
        example: what to trace with.

    Raises:
        ValueError: as `qa_lora`.
    """
    check_model(model)
    with evaluation_mode(model):
        recipe = _recipe(rank, alpha, 0, ())
        program = TracedModel.of(model, recipe, None, example).program
        _, report = run(program, recipe, verify=False)
    modules = dict(model.named_modules())
    return [name for name in report.passes[0].done if isinstance(modules.get(name), QuantLinear)]


def _recipe(rank: int, alpha: float, seed: int, rules: Iterable[Rule]) -> Recipe:
    return Recipe("qa-lora", (QALoRA(rank, alpha, seed),), tuple(rules), "QA-LoRA (arXiv:2309.14717)")
