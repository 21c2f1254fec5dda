"""Checkpoints: one safetensors file and JSON, written whole or not at all; nothing is unpickled.

model.safetensors   every parameter and buffer, packed codes included
qcompile.json       schema, recipe, tied tensors, and the modules that differ from the float model (module_entries.py)
config.json ...     the model's own configuration and tokenizer, when it has them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qcompile.checkpoint.atomic_folder import CheckpointError, atomic_folder
from qcompile.checkpoint.module_entries import Entry, describe, place, replaced_parameters
from qcompile.modules.generation_hooks import attach_loaded
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.schema import UnknownSchema, needs_upgrade, stamp, upgrade

_TENSORS, _META = "model.safetensors", "qcompile.json"


@dataclass(frozen=True)
class _Meta:
    """The content of qcompile.json.

    Attributes:
        recipe: the recipe as plain data of the present schema; None for a float model.
        model_class: the class of the model.
        shared: name of a tied tensor -> the name that holds it.
        modules: path -> entry of a module.
    """

    recipe: dict[str, Any] | None
    model_class: str
    shared: Mapping[str, str]
    modules: Mapping[str, Entry]


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write a quantized (or float) model to a new folder.

    Args:
        model: the model.
        folder: the folder, which may exist if it is empty.
        tokenizer: of transformers, saved beside the model; None for none.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists and is not empty.
    """
    with atomic_folder(folder) as work:
        tensors, shared = _without_tied(model.state_dict())
        save_file(tensors, str(work / _TENSORS), metadata={"format": "pt"})
        meta = {
            **stamp(),
            "recipe": getattr(model, "qcompile_recipe", None),
            "class": type(model).__name__,
            "shared": shared,
            "modules": {path: entry for path, m in model.named_modules() if (entry := describe(m))},
        }
        (work / _META).write_text(json.dumps(meta, indent=1) + "\n")
        parts: list[Any] = [getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer]
        for part in parts:
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(str(work))
    return Path(folder)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a folder that `save` wrote.

    Args:
        folder: the folder.
        model: the float model to fill; without it, transformers builds the class that config.json
            names, with random weights that are then replaced.

    Returns:
        The model, for inference. A file of schema 1 is upgraded in memory, with one warning.

    Raises:
        CheckpointError: a missing, truncated or foreign file, an unknown schema, or another model's tensors. A model
            that was passed in is then unchanged.
    """
    root = Path(folder)
    meta = _read_meta(root)
    tensors = _read_tensors(root / _TENSORS)
    target = model if model is not None else _build(root, meta)
    for name, owner in meta.shared.items():
        tensors[name] = tensors[owner]
    _check(target, meta, tensors, root)
    for path, entry in meta.modules.items():
        place(target, path, entry, tensors)
    own = target.state_dict()
    for name in [n for n in tensors if n not in own]:  # a bias that was folded into a linear without one
        parent, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(parent), leaf, nn.Parameter(tensors[name], requires_grad=False))
    target.load_state_dict(tensors, strict=True, assign=True)
    setattr(target, "qcompile_recipe", meta.recipe)  # noqa: B010  not an attribute that nn.Module declares
    if meta.recipe is not None:
        attach_loaded(target, Recipe.from_json(meta.recipe))
    return target.requires_grad_(False).eval()


def _without_tied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors by name, each once; and for the names of tied ones the name that holds it."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in owners:
            shared[name] = owners[key]
        else:
            owners[key] = name
            tensors[name] = tensor.contiguous()
    return tensors, shared


def _read_meta(root: Path) -> _Meta:
    path = root / _META
    if not path.is_file():
        raise CheckpointError(f"{root} holds no {_META}. Fix: name a folder that qcompile.save wrote")
    try:
        meta: Any = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Fix: save the model again") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} is not of a checkpoint. Fix: name a folder that qcompile.save wrote")
    try:
        older = needs_upgrade(meta, str(root))
    except UnknownSchema as error:
        raise CheckpointError(str(error)) from None
    missing = [key for key in ("recipe", "class", "shared", "modules") if key not in meta]
    if missing:
        raise CheckpointError(f"{path} is damaged: it has no {', '.join(missing)}. Fix: save the model again")
    recipe = upgrade(meta["recipe"]) if older and meta["recipe"] is not None else meta["recipe"]
    return _Meta(recipe, meta["class"], meta["shared"], meta["modules"])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is missing, truncated or foreign. Fix: save the model again"
        ) from error


def _build(root: Path, meta: _Meta) -> nn.Module:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{root} needs its float model. Fix: pass it, load(folder, model), or pip install transformers"
        ) from error
    if not (root / "config.json").is_file():
        raise CheckpointError(f"{root} has no config.json. Fix: pass the float model, load(folder, model)")
    cls = getattr(transformers, meta.model_class, None)
    if cls is None:
        raise CheckpointError(
            f"transformers has no class {meta.model_class}. Fix: pass the float model, load(folder, model)"
        )
    built: nn.Module = cls(transformers.AutoConfig.from_pretrained(str(root)))
    if (root / "generation_config.json").is_file() and hasattr(built, "generation_config"):
        built.generation_config = transformers.GenerationConfig.from_pretrained(str(root))
    return built


def _check(model: nn.Module, meta: _Meta, tensors: Mapping[str, Tensor], root: Path) -> None:
    """Check before the model is touched that its tensors are those of the checkpoint."""
    inside = tuple(f"{path}." for path in meta.modules)  # of the modules that are replaced
    replaced = replaced_parameters(meta.modules)
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(inside) and n not in replaced}
    wrong = [n for n, t in own.items() if n not in tensors or tensors[n].shape != t.shape]
    extra = [n for n in tensors if n not in own and not n.startswith(inside) and not n.endswith(".bias")]
    if wrong or extra:
        raise CheckpointError(
            f"{root} holds another model: missing or misshapen {wrong[:4]}, unknown {extra[:4]}. "
            "Fix: pass the float model that was quantized"
        )
