"""`load_package("model.pt2")`: a packaged model, opened without compiling."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.api.packaged_module import PackagedModule
from qcompile.backend.package_archive import PackageFile
from qcompile.checkpoint.atomic_folder import CheckpointError


def load_package(path: str | Path) -> Any:
    """Open a file that `qcompile.package` wrote. Its libraries are code: open what you trust.

    Weights are mapped from the file: processes that open the same package share them.

    Args:
        path: the file.

    Returns:
        For a causal LM a model of transformers with `generate()`, for any other module what is called as the module
        was; with a `tokenizer` (None if none was packaged).

    Raises:
        CheckpointError: it is no package, it is damaged, or it needs another torch, processor or version of qcompile.
    """
    opened = PackageFile(path)
    graphs, description = opened.open_graphs(), opened.description
    with tempfile.TemporaryDirectory() as folder:
        _write_files(opened, Path(folder))
        text = description["kind"] == "text"
        model: Any = _causal_lm(graphs, description, folder) if text else PackagedModule(graphs["module"], description)
        model.tokenizer = _tokenizer(folder)
    return model


def _write_files(opened: PackageFile, folder: Path) -> None:
    for name, content in opened.files().items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{opened.path} is damaged: it holds a file {name}. Fix: package the model again")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _causal_lm(graphs: Mapping[str, Any], description: Mapping[str, Any], folder: str) -> Any:
    from transformers import AutoConfig, GenerationConfig

    from qcompile.generation.packaged_causal_lm import PackagedCausalLM

    sizes = [int(size) for size in description["cache"].split()]
    cache = list(zip(sizes[::2], sizes[1::2], strict=True))
    dtype = getattr(torch, description["cache_dtype"])
    model = PackagedCausalLM(AutoConfig.from_pretrained(folder), graphs["prompt"], graphs["step"], cache, dtype)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _tokenizer(folder: str) -> Any:
    """The tokenizer of a folder; None where there is none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
