"""The files of transformers in a checkpoint: writing them so that no other loader takes the folder for a float model.

A loader that does not know quantized modules would build the float class and fill it with random weights. So
config.json names the method "qcompile", which other programs refuse, and transformers itself stops at
`transformers_weights`, unless qcompile is imported: then transformers_plugin/ reads what `quantization_config` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_meta import META, FolderMeta, content_digest
from qcompile.recipe.strict_json import read_json

CONFIG, _GENERATION = "config.json", "generation_config.json"
METHOD = "qcompile"
WEIGHTS = "transformers_weights"
_STOP = "none for transformers alone: import qcompile before, or read this folder with qcompile.load"
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
_GIVE = "Fix: pass the float model, load(folder, model)"


def write_files(
    model: nn.Module, tokenizer: Any, work: Path, *, mark: bool, stored: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Write a model's configuration and tokenizer, where it has them.

    Args:
        model: the model.
        tokenizer: of transformers; None for none.
        work: the folder.
        mark: whether to make config.json one that only qcompile reads.
        stored: what it then says of the quantized model (FolderMeta.to_json).

    Returns:
        Name of a file -> digest of its content, of the files that decide what the model computes.
    """
    parts: list[Any] = [getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer]
    for part in parts:
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(str(work))
    path = work / CONFIG
    if not path.is_file():
        return {}
    data = read_json(path)
    data["architectures"] = [type(model).__name__]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is not None:
        data["dtype"] = str(dtype).removeprefix("torch.")
    if mark:
        data |= {"quantization_config": {"quant_method": METHOD, **(stored or {})}, WEIGHTS: _STOP}
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {CONFIG: content_digest(data)}


def implementations(model: nn.Module) -> dict[str, dict[str, str]]:
    """Path of a config of the model -> which implementations of attention and experts it chose."""
    found = {}
    for path, config in _configs(getattr(model, "config", None)):
        values = {name: getattr(config, name, None) for name in _IMPLEMENTATIONS}
        found[path] = {name: value for name, value in values.items() if isinstance(value, str)}
    return {path: values for path, values in found.items() if values}


def build_model(root: Path, meta: FolderMeta) -> nn.Module:
    """The float model of a folder, with random weights that are to be replaced.

    Raises:
        CheckpointError: transformers is missing, does not know the class, or does not take the configuration.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{root} needs its float model. Fix: pass it, load(folder, model), or pip install transformers"
        ) from error
    if not (root / CONFIG).is_file():
        raise CheckpointError(f"{root} has no {CONFIG}. {_GIVE}")
    meta.check_file(root / CONFIG)
    cls = getattr(transformers, meta.model_class, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(f"transformers has no class {meta.model_class}. {_GIVE}")
    try:
        config = transformers.AutoConfig.from_pretrained(str(root), trust_remote_code=False)
        for name in ("quantization_config", WEIGHTS):
            config.__dict__.pop(name, None)
        set_implementations(config, meta)
        with torch.random.fork_rng(devices=[]):  # random weights are replaced, and the caller's generator is his own
            built: nn.Module = cls(config)
        if (root / _GENERATION).is_file() and hasattr(built, "generation_config"):
            built.generation_config = transformers.GenerationConfig.from_pretrained(str(root))
    except Exception as error:  # transformers, of whatever a damaged or foreign configuration makes it do
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(
            f"{meta.model_class} cannot be built from {root / CONFIG} ({reason:.300}). {_GIVE}"
        ) from error
    return built


def describe_folder(root: Path) -> str:
    """What a folder without qcompile.json is, and the fix, as the end of a sentence."""
    if not root.exists():
        return "does not exist. Fix: check the path"
    if not root.is_dir():
        return "is a file. Fix: name the folder that it is in"
    if (root / "model.onnx").is_file():
        return f"is an exported ONNX folder and holds no {META}. Fix: run it with `qcompile generate`, or ONNX Runtime"
    if (root / CONFIG).is_file():
        method = _method_of(root / CONFIG)
        if method not in (None, METHOD):
            return f"is quantized by {method!r}. Fix: read it with transformers, or quantize the float model"
        return (
            f"holds no {META}: it is a folder of transformers. Fix: read it with qcompile.load_pretrained, or name a "
            "folder that qcompile.save wrote"
        )
    if not any(root.iterdir()):
        return f"is empty: it holds no {META}. Fix: name a folder that qcompile.save wrote"
    return f"holds no {META}. Fix: name a folder that qcompile.save wrote"


def _method_of(path: Path) -> Any:
    """The quantization method that a config.json names; None for none."""
    try:
        return read_json(path)["quantization_config"]["quant_method"]
    except (ValueError, TypeError, LookupError):
        return None


def _configs(config: Any) -> Iterator[tuple[str, Any]]:
    """A configuration and those inside it, each with its path."""
    if config is None:
        return
    yield "", config
    for key in getattr(config, "sub_configs", None) or {}:
        for path, inner in _configs(getattr(config, key, None)):
            yield f"{key}.{path}".removesuffix("."), inner


def set_implementations(config: Any, meta: FolderMeta, *, only_unset: bool = False) -> None:
    """Give a configuration, and those inside it, the implementations that ran.

    Args:
        config: of transformers, changed in place.
        meta: of the folder.
        only_unset: leave those that somebody chose.
    """
    found = [
        (inner, name, value)
        for path, inner in _configs(config)
        for name, value in meta.implementations.get(path, {}).items()
        if name in _IMPLEMENTATIONS and not (only_unset and getattr(inner, f"{name}_internal", None) is not None)
    ]
    for inner, name, value in found:  # in the order of _configs: setting one sets those inside it too
        setattr(inner, name, value)
