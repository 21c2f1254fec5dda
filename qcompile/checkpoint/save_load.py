"""Checkpoints: one safetensors file and JSON, written whole or not at all; nothing is unpickled.

model.safetensors   every parameter and buffer, packed codes included
qcompile.json       schema, recipe, tied tensors, digests, and what differs from the float model (folder_meta.py)
config.json ...     the model's own configuration and tokenizer, when it has them (transformers_folder.py)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError, atomic_folder
from qcompile.checkpoint.fill_plan import FillPlan
from qcompile.checkpoint.folder_meta import META, FolderMeta, read_meta
from qcompile.checkpoint.foreign_save import forbid_save_pretrained
from qcompile.checkpoint.model_state import ModelState
from qcompile.checkpoint.tensor_file import digests, read_tensors
from qcompile.checkpoint.transformers_folder import build_model, describe_folder, implementations, write_files
from qcompile.modules.generation_hooks import attach_loaded
from qcompile.modules.training_module import refuse_training
from qcompile.modules.wrappers import unwrapped

_TENSORS = "model.safetensors"


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write a quantized (or float) model to a new folder.

    Args:
        model: the model; one behind torch.compile, DataParallel or DistributedDataParallel is saved without them.
        folder: the folder, which may exist if it is empty.
        tokenizer: of transformers, saved beside the model; None for none.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists and is not empty or cannot be written (a WriteError), or the model has
            something that no checkpoint can store. Nothing is then left there.
    """
    inner = unwrapped(model)
    try:
        refuse_training(inner, "qcompile.save")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    state = ModelState.of(inner)
    recipe = getattr(model, "qcompile_recipe", None)
    with atomic_folder(folder, sum(tensor.nbytes for tensor in state.tensors.values())) as work:
        # The format says "pt" only where transformers reads what was saved.
        tied = getattr(inner, "all_tied_weights_keys", None) or {}
        known = {*tied, *tied.values(), *state.computed}
        of_transformers = recipe is None and not state.modules and state.shared.keys() <= known
        save_file(state.tensors, str(work / _TENSORS), metadata={"format": "pt" if of_transformers else "qcompile"})
        FolderMeta(
            recipe,
            type(inner).__name__,
            state.shared,
            state.modules,
            frozenset(state.computed),
            state.scalars,
            implementations(inner),
            digests(state.tensors),
            write_files(inner, tokenizer, work, mark=not of_transformers),
        ).write(work)
    return Path(folder)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a folder that `save` wrote.

    Everything is checked before the model is changed: the digest of every tensor, names, shapes and dtypes against the
    model and the formats, and the range of scales, zero points and codes.

    Args:
        folder: the folder.
        model: the float model to fill; without it, transformers builds the class that was saved, with random weights
            that are then replaced.

    Returns:
        The model, for inference. A file of schema 1 is upgraded in memory, with one warning.

    Raises:
        CheckpointError: a missing, truncated, damaged or foreign file, an unknown schema, or another model's tensors.
            A model that was passed in is then unchanged.
    """
    root = Path(folder)
    if not (root / META).is_file():
        raise CheckpointError(f"{root} {describe_folder(root)}")
    meta = read_meta(root)
    recipe = meta.parsed_recipe()
    tensors = read_tensors(root / _TENSORS, meta.tensors)
    result = model if model is not None else build_model(root, meta)
    target = unwrapped(result)
    FillPlan.of(target, meta, tensors, root).apply()
    setattr(target, "qcompile_recipe", meta.recipe)  # noqa: B010  not an attribute that nn.Module declares
    forbid_save_pretrained(target)
    if recipe is not None:
        attach_loaded(target, recipe)
    return result.requires_grad_(False).eval()
