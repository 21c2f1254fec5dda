"""Checkpoints: safetensors files and JSON, written whole or not at all; nothing is unpickled.

qcompile.safetensors   every parameter and buffer, packed codes included; of a model that is none of transformers, or
                       that transformers reads as it is: model.safetensors. Several files have an index beside them
qcompile.json          schema, recipe, tied tensors, digests, and what differs from the float model (folder_meta.py)
config.json ...        the model's own configuration and tokenizer, when it has them (transformers_folder.py)
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError, atomic_folder
from qcompile.checkpoint.fill_plan import FillPlan
from qcompile.checkpoint.folder_content import FolderContent
from qcompile.checkpoint.folder_meta import META, read_meta
from qcompile.checkpoint.model_state import slots
from qcompile.checkpoint.save_as_pretrained import give_save_pretrained
from qcompile.checkpoint.stored_files import stored_tensors
from qcompile.checkpoint.tensor_file import DEFAULT_SHARD, files_of, read_tensors, require_digests
from qcompile.checkpoint.transformers_folder import build_model, describe_folder
from qcompile.modules.generation_hooks import attach_loaded
from qcompile.modules.wrappers import unwrapped


def save(
    model: nn.Module, folder: str | Path, tokenizer: Any = None, *, max_shard_size: int | str = DEFAULT_SHARD
) -> Path:
    """Write a quantized (or float) model to a new folder.

    A folder of a model of transformers is also opened by its `from_pretrained`, once qcompile is imported.

    Args:
        model: the model; one behind torch.compile, DataParallel or DistributedDataParallel is saved without them.
        folder: the folder, which may exist if it is empty.
        tokenizer: of transformers, saved beside the model; None for none.
        max_shard_size: the largest size of one file of tensors, in bytes or as "5GB"; a larger tensor has its own file.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists and is not empty or cannot be written (a WriteError), or the model has
            something that no checkpoint can store. Nothing is then left there.
    """
    content = FolderContent.of(model, max_shard_size)
    with atomic_folder(folder, content.size) as work:
        content.write(work, tokenizer)
    return Path(folder)


def load(folder: str | Path, model: nn.Module | None = None, *, stream: bool = False) -> nn.Module:
    """Read a folder that `save`, or `save_pretrained` of a quantized model, wrote.

    Everything is checked before the model is changed: the digest of every tensor, names, shapes and dtypes against the
    model and the formats, and the range of scales, zero points and codes.

    Args:
        folder: the folder.
        model: the float model to fill; without it, transformers builds the class that was saved, with random weights
            that are then replaced.
        stream: leave the tensors in the folder's files; each is read when it is needed, once now to be checked.

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
    if stream:
        tensors = stored_tensors(files_of(root / meta.weights))
        if meta.tensors is not None:
            require_digests(root / meta.weights, tensors, meta.tensors)
    else:
        tensors = read_tensors(root / meta.weights, meta.tensors)
    with torch.device("meta") if stream else contextlib.nullcontext():
        result = model if model is not None else build_model(root, meta)
    target = unwrapped(result)
    FillPlan.of(target, meta, tensors, root).apply()
    _require_filled(target, root)
    setattr(target, "qcompile_recipe", meta.recipe)  # noqa: B010  not an attribute that nn.Module declares
    if recipe is not None:
        attach_loaded(target, recipe)
    give_save_pretrained(target)
    return result.requires_grad_(False).eval()


def _require_filled(model: nn.Module, root: Path) -> None:
    """Refuse a model that computes tensors which the folder does not have, where it was built without values."""
    empty = [name for name, slot in slots(model).items() if slot.tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{root} does not hold {empty[:4]}, which the model computes as it is built. Fix: load it without stream"
        )
