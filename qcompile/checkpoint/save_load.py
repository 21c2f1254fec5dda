"""Checkpoints: one safetensors file and JSON, written whole or not at all; nothing is unpickled.

model.safetensors   every parameter and buffer, packed codes included
qcompile.json       schema, recipe, and what stands where: {path: {"kind": ..., sizes, formats}}
config.json ...     the model's own configuration and tokenizer, when it has them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError, atomic_folder
from qcompile.modules.generation_hooks import attach_again
from qcompile.modules.kv_constants import Centers, Prefix, Scales
from qcompile.modules.quant_experts import STACK, QuantStack, hold_stack
from qcompile.modules.quant_linear import PARTS, QuantLinear, RotatedLinear
from qcompile.numerics.format import Format
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.schema import UnknownSchema, is_older, stamp, upgraded

_TENSORS, _META = "model.safetensors", "qcompile.json"


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write a quantized (or float) model to a new folder.

    Raises:
        CheckpointError: the folder exists and is not empty.
    """
    with atomic_folder(folder) as work:
        tensors, shared = {}, {}
        seen: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
        for name, tensor in model.state_dict().items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and key in seen:
                shared[name] = seen[key]
            else:
                seen[key] = name
                tensors[name] = tensor.contiguous()
        save_file(tensors, str(work / _TENSORS), metadata={"format": "pt"})
        meta = {
            **stamp(),
            "recipe": getattr(model, "qcompile_recipe", None),
            "class": type(model).__name__,
            "shared": shared,
            "modules": {path: entry for path, m in model.named_modules() if (entry := _describe(m))},
        }
        (work / _META).write_text(json.dumps(meta, indent=1) + "\n")
        for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(str(work))
    return Path(folder)


def _describe(module: nn.Module) -> dict[str, Any] | None:
    if isinstance(module, QuantLinear):
        has = [n for n in PARTS if getattr(module, n) is not None]
        return {
            "kind": "QuantLinear",
            "in": module.in_features,
            "out": module.out_features,
            "format": str(module.format),
            "act": str(module.act) if module.act else None,
            "has": has,
            "rank": 0 if module.low_in is None else module.low_in.shape[0],
        }
    if isinstance(module, QuantStack):
        return {"kind": "QuantStack", **module.describe()}
    if isinstance(module, (Prefix, Centers, Scales)):
        return {"kind": type(module).__name__, "shapes": {name: list(t.shape) for name, t in module.named_buffers()}}
    if isinstance(module, RotatedLinear):
        return {"kind": "RotatedLinear"}
    if isinstance(module, nn.RMSNorm):
        return {"kind": "RMSNorm", "shape": list(module.normalized_shape), "eps": module.eps}
    return None


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a folder that `save` wrote.

    Args:
        folder: the folder.
        model: the float model to fill; without it, transformers builds the class that config.json
            names, with random weights that are then replaced.

    Raises:
        CheckpointError: a missing, truncated or foreign file, or another model's tensors. A model
            that was passed in is then unchanged.
    """
    root = Path(folder)
    meta = _read_meta(root)
    tensors = _read_tensors(root / _TENSORS)
    target = model if model is not None else _build(root, meta)
    for name, owner in meta["shared"].items():
        tensors[name] = tensors[owner]
    _check(target, meta, tensors, root)
    for path, entry in meta["modules"].items():
        _place(target, path, entry)
    own = target.state_dict()
    for name in [n for n in tensors if n not in own]:  # a shift that was folded into a linear without bias
        parent, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(parent), leaf, nn.Parameter(tensors[name], requires_grad=False))
    target.load_state_dict(tensors, strict=True, assign=True)
    target.qcompile_recipe = meta["recipe"]
    if meta["recipe"] is not None:
        attach_again(target, Recipe.from_json(meta["recipe"]))
    return target.requires_grad_(False).eval()


def _read_meta(root: Path) -> dict[str, Any]:
    path = root / _META
    if not path.is_file():
        raise CheckpointError(f"{root} holds no {_META}: it was not written by qcompile.save")
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): save the model again") from error
    if not isinstance(meta, dict) or "modules" not in meta:
        raise CheckpointError(f"{path} is not a qcompile checkpoint: it names no modules; save the model again")
    try:
        older = is_older(meta, str(root))
    except UnknownSchema as error:
        raise CheckpointError(str(error)) from None
    if older and meta["recipe"] is not None:
        meta["recipe"] = upgraded(meta["recipe"])
    return meta


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is truncated or foreign, save again") from error


def _build(root: Path, meta: dict[str, Any]) -> nn.Module:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise CheckpointError("pass the float model to load(), or pip install transformers") from error
    if not (root / "config.json").is_file():
        raise CheckpointError(f"{root} has no config.json: pass the float model, load(folder, model)")
    kind = getattr(transformers, meta["class"], None)
    if kind is None:
        raise CheckpointError(f"transformers has no class {meta['class']}: pass the float model, load(folder, model)")
    config = transformers.AutoConfig.from_pretrained(str(root))
    built: nn.Module = kind(config)
    generation = root / "generation_config.json"
    if generation.is_file() and hasattr(built, "generation_config"):
        built.generation_config = transformers.GenerationConfig.from_pretrained(str(root))
    return built


def _check(model: nn.Module, meta: dict[str, Any], tensors: dict[str, torch.Tensor], root: Path) -> None:
    """Everything that could go wrong while filling the model, before touching it."""
    prefixes = tuple(f"{path}." for path in meta["modules"])
    stacks = {p.removesuffix(STACK) for p, entry in meta["modules"].items() if entry["kind"] == "QuantStack"}
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(prefixes) and n not in stacks}
    foreign = [n for n, t in own.items() if n not in tensors or tensors[n].shape != t.shape]
    extra = [n for n in tensors if n not in own and not n.startswith(prefixes) and not n.endswith(".bias")]
    if foreign or extra:
        raise CheckpointError(f"{root} holds another model: missing or misshapen {foreign[:4]}, unknown {extra[:4]}")


def _place(model: nn.Module, path: str, entry: dict[str, Any]) -> None:
    if entry["kind"] == "QuantLinear":
        act = Format.parse(entry["act"]) if entry["act"] else None
        form = Format.parse(entry["format"])
        rank = entry.get("rank", 0)
        model.set_submodule(path, QuantLinear.empty(entry["in"], entry["out"], form, act, set(entry["has"]), rank))
    elif entry["kind"] == "QuantStack":
        hold_stack(model, path.removesuffix(STACK), QuantStack.empty(entry))
    elif entry["kind"] == "Prefix":
        model.add_module(path, Prefix.empty(entry["shapes"]))
    elif entry["kind"] == "Centers":
        model.add_module(path, Centers([torch.empty(shape) for shape in entry["shapes"].values()]))
    elif entry["kind"] == "Scales":
        model.add_module(path, Scales.empty(entry["shapes"]))
    elif entry["kind"] == "RMSNorm":
        model.set_submodule(path, nn.RMSNorm(entry["shape"], eps=entry["eps"]))
    else:
        inner = model.get_submodule(path)
        if not isinstance(inner, RotatedLinear):
            features = inner.weight.shape[1]
            model.set_submodule(path, RotatedLinear(inner, torch.empty(features)))
