"""Quantize a model from a folder to a folder, or from a GGUF file to another, one layer in memory at a time.

The model is built with stored tensors (qcompile/memory/stored_tensor.py), so everything that `quantize` does runs as it
is. What is new here is the place beside the output: rewritten weights lie there until they are written, and every
finished group of sites, from where a killed run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from torch import nn

from qcompile.api.device_placement import move_to_device
from qcompile.api.rewrite_model import rewrite_model
from qcompile.api.served_formats import check_recipe
from qcompile.api.workspace import Workspace
from qcompile.calibration.ranks import Ranks
from qcompile.checkpoint.atomic_folder import require_empty
from qcompile.checkpoint.finished_folder import LOG, SUFFIX
from qcompile.checkpoint.save_as_pretrained import give_save_pretrained
from qcompile.checkpoint.save_load import save
from qcompile.checkpoint.stored_files import safetensors_of
from qcompile.checkpoint.tensor_file import DEFAULT_SHARD, size_in_bytes
from qcompile.checkpoint.writers.export_refusals import check_class
from qcompile.checkpoint.writers.gguf_blocks import TARGET as GGUF_FORMAT
from qcompile.checkpoint.writers.gguf_file import written_gguf
from qcompile.checkpoint.writers.gguf_template import GgufTemplate
from qcompile.generation.pretrained import GGUF, load_in_parts
from qcompile.memory.atomic_file import whole_file
from qcompile.memory.process import large_blocks_returned
from qcompile.modules.generation_plan import with_own_prefix
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError


def quantize_folder(
    source: str | Path,
    out: str | Path,
    recipe: str | Recipe | dict[str, object] = "int8",
    batches: Iterable[Any] | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    example: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    memory: int | str | None = None,
    resume: bool = False,
    dump: str | Path | None = None,
    verify: bool = True,
    progress: bool = True,
    max_shard_size: int | str = DEFAULT_SHARD,
) -> Report:
    """Quantize the model of a folder or a file and write it to another one; it is never whole in memory.

    Args:
        source: a folder of transformers with safetensors files, or a GGUF file.
        out: the folder to write; must not exist, or be empty. A name that ends in .gguf is one file for llama.cpp, made
            after `source`, which is one too. What is finished lies in `<out>.unfinished` meanwhile.
        recipe: as for `quantize`.
        batches: calibration data, as for `quantize`.
        model: of `source`, if it is open already (`load_pretrained(.., stream=True)`).
        tokenizer: to be saved too.
        example: what to trace with where there are no batches.
        dtype: of the float weights; None: the one that config.json names.
        device: where computing is done, as "cuda": a weight goes there when it is read.
        memory: bytes that the run may take, or a text as "12GB"; values of batches go to files beside `out` where they
            do not fit. None: what is free.
        resume: go on with `<out>.unfinished`, which a run that was killed left there.
        dump: folder for the graph before and after every pass.
        verify: certify every exact pass on the first batch.
        progress: show bars.
        max_shard_size: the largest size of one file of tensors.

    Returns:
        What was done.

    Raises:
        ValueError: as of `quantize`, `save` and `load_pretrained`; what was finished stays for `resume`.
    """
    target, is_file = Path(out), Path(source).suffix == GGUF
    if target.suffix == GGUF and not is_file:
        raise RecipeError(f"{out} is made after a GGUF file, and {source} is none. Fix: name a folder to write")
    require_empty(out)
    if model is None:
        model, own = load_in_parts(source, dtype)
        tokenizer = tokenizer if tokenizer is not None else own
    chosen = find_recipe(recipe, model, data=batches is not None)
    template = GgufTemplate(Path(source)) if target.suffix == GGUF else None
    if template is not None:
        check_class(model, GGUF_FORMAT)
        check_recipe(chosen, model, GGUF_FORMAT)
        template.check(model)
    move_to_device(model, device)
    ranks = Ranks.joined()
    workspace = Workspace(
        target.with_name(target.name + SUFFIX),
        (Path(source),) if is_file else tuple(safetensors_of(Path(source))),
        resume,
        ranks,
        None if memory is None else size_in_bytes(memory, "memory"),
        _tell if progress and ranks.is_first else lambda text: None,
    )
    chosen = with_own_prefix(chosen, model)
    if chosen.trains:
        raise RecipeError(f"recipe {chosen.name!r} trains, which needs the whole model. Fix: qcompile.train")
    with large_blocks_returned():
        report, ran = rewrite_model(
            model,
            chosen,
            batches,
            example=example,
            verify=verify,
            progress=progress and ranks.is_first,
            dump=dump if ranks.is_first else None,
            workspace=workspace,
        )
        object.__setattr__(model, "qcompile_recipe", ran.to_json())
        give_save_pretrained(model)
        if ranks.is_first and template is not None:
            with whole_file(target) as file:
                report.passes.append(written_gguf(model, template, file))
        elif ranks.is_first:
            save(model, target, tokenizer, max_shard_size=max_shard_size)
            log = workspace.path / LOG
            if log.is_file():
                shutil.copyfile(log, target / LOG)
        ranks.wait()  # the others' files lie in the folder that goes now
    if ranks.is_first:
        shutil.rmtree(workspace.path, ignore_errors=True)
    return report


def _tell(text: str) -> None:
    get_console().print(text, highlight=False, soft_wrap=True)
