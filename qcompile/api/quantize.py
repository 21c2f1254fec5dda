"""`quantize(model, recipe, batches)`: run a recipe and write its result into the model, in place (rewrite_model.py)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.api.model_checks import check_model
from qcompile.api.model_wrappers import inner_model
from qcompile.api.quantize_folder import quantize_folder
from qcompile.api.rewrite_model import rewrite_model
from qcompile.checkpoint.save_as_pretrained import give_save_pretrained
from qcompile.modules.generation_plan import with_own_prefix
from qcompile.modules.training_module import refuse_training
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError


def quantize(
    model: nn.Module | str | Path,
    recipe: str | Recipe | dict[str, object] = "int8",
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    verify: bool = True,
    progress: bool = True,
    dump: str | Path | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    memory: int | str | None = None,
    resume: bool = False,
) -> Report:
    """Quantize a model in place, or that of a folder to another folder.

    Args:
        model: any module; its class, `generate`, `state_dict` and device moves stay. Of a model wrapped by
            torch.compile, DataParallel or adapters the inner one is quantized. No parameter requires a gradient
            afterwards: `qa_lora` trains adapters, `requires_grad_` whatever you choose. Or a folder of transformers
            with safetensors files, or a GGUF file, larger than memory perhaps: see `quantize_folder`.
        recipe: preset name (`qcompile recipes`), "auto" (see pipeline/advise.py), Recipe, plain data or path to a
            JSON file.
        batches: calibration data: dicts of keyword arguments, tuples of arguments, or tensors; arrays and lists of
            integers become tensors. Needed by recipes with statistics; else only the first is used, to trace and to
            verify. Read once.
        example: what to trace with when there are no batches; transformers' models bring their own.
        verify: certify every exact pass on the first batch.
        progress: show bars.
        dump: folder for the graph before and after every pass, as text with diffs: the way to debug a pass.
        out: the folder to write, where `model` is a folder.
        device: where the model of a folder is computed, as "cuda"; None: on the CPU. A model in memory is computed
            where it is, and batches are moved there.
        memory: what a run on a folder may take, in bytes or as "12GB".
        resume: go on with what a killed run left beside `out`.

    Returns:
        What was done, what was skipped and why; its metrics hold the distance from the float model on the first batch.

    Warns:
        UserWarning: an exact pass that broke its law and was undone; a result that is far from the float model.

    Raises:
        ValueError: (as RecipeError, CaptureError, CalibrationError, NothingToQuantize) with the
            place and the fix; the model is then unchanged.
    """
    if isinstance(model, (str, Path)):
        if out is None:
            raise ValueError(f"{model} is a folder, and out= names none to write. Fix: quantize(.., out=<path>)")
        return quantize_folder(
            model,
            out,
            recipe,
            batches,
            example=example,
            device=device or "cpu",
            memory=memory,
            resume=resume,
            dump=dump,
            verify=verify,
            progress=progress,
        )
    if out is not None or device is not None or memory is not None or resume:
        raise ValueError(
            "out=, device=, memory= and resume= go with a folder, the model is in memory. "
            "Fix: model.to(device), and qcompile.save(model, path)"
        )
    model = inner_model(model)
    check_model(model)
    refuse_training(model, "qcompile.quantize")
    chosen = with_own_prefix(find_recipe(recipe, model, data=batches is not None), model)
    if chosen.trains:
        raise RecipeError(f"recipe {chosen.name!r} trains. Fix: qcompile.train(model, {chosen.name!r})")
    report, ran = rewrite_model(model, chosen, batches, example=example, verify=verify, progress=progress, dump=dump)
    object.__setattr__(model, "qcompile_recipe", ran.to_json())  # an attribute of ours, for `save`
    give_save_pretrained(model)
    model.requires_grad_(False)
    return report
