"""A sentence embedding as an output of the file, and the files that make the folder one of sentence-transformers.

    mean    of the tokens that are not padding       cls    of the first token       last    of the last one

The token embeddings stay an output: sentence-transformers pools them itself, as 1_Pooling/config.json says,
and so gets the same sentence_embedding that other callers read from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

POOLING_MODES = ("mean", "cls", "last")
TOKENS, SENTENCE = "last_hidden_state", "sentence_embedding"

_CONFIG_NAMES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}  # in 1_Pooling/config.json
_OTHER_CONFIG_NAMES = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


class PoolingError(ValueError):
    """A model or an example that has nothing to pool; the text says what is missing."""


@dataclass(frozen=True)
class Pooling:
    """How token embeddings become a sentence embedding.

    Attributes:
        mode: one of POOLING_MODES.
        normalize: whether the result has norm 1.

    Raises:
        PoolingError: an unknown mode.
    """

    mode: str
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.mode not in POOLING_MODES:
            raise PoolingError(f"pooling {self.mode!r} is unknown. Fix: use one of {', '.join(POOLING_MODES)}")

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens [B, T, C] float, mask [B, T] with 0 for padding -> [B, C]."""
        if self.mode == "mean":
            weights = mask[..., None].to(tokens.dtype)
            pooled = (tokens * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
        elif self.mode == "cls":
            pooled = tokens[:, 0]
        else:  # padding may lie before a text or behind it
            positions = torch.arange(mask.shape[1], device=mask.device) * (mask != 0)
            pooled = tokens.gather(1, positions.argmax(1)[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


class PooledEncoder(nn.Module):
    """A model that returns token embeddings and the sentence embedding, and nothing else."""

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.config = getattr(model, "config", None)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the model, attention_mask [B, T] among them."""
        tokens = _token_embeddings(self.model(**inputs))
        return {TOKENS: tokens, SENTENCE: self.pooling(tokens, inputs["attention_mask"])}


def _token_embeddings(out: Any) -> Tensor:
    if isinstance(out, Mapping):
        if not isinstance(out.get(TOKENS), Tensor):
            raise PoolingError(
                f"pooling: the model returns {', '.join(map(str, out))}, and no {TOKENS}. "
                "Fix: give it without its head (transformers.AutoModel)"
            )
        return out[TOKENS]
    return out if isinstance(out, Tensor) else out[0]


def check_example(model: nn.Module, example: Any) -> None:
    """Refuse what cannot be pooled, before any work.

    Args:
        model: an encoder.
        example: its keyword arguments.

    Raises:
        PoolingError: no example, none with attention_mask, or a model that returns no embedding of each token.
    """
    if not isinstance(example, Mapping) or "attention_mask" not in example:
        raise PoolingError(
            "pooling needs example=.. with the model's keyword arguments, attention_mask [B, T] among them. "
            "Fix: give what the tokenizer returns for two texts with padding=True"
        )
    with torch.no_grad():
        tokens = _token_embeddings(model(**example))
    if tokens.ndim != 3 or tokens.shape[:2] != example["attention_mask"].shape:
        raise PoolingError(
            f"pooling: the model returns {list(tokens.shape)} for texts of {list(example['attention_mask'].shape)} "
            "tokens, not one embedding for each token. Fix: export it without pooling"
        )


def write_pooling(folder: Path, pooling: Pooling, width: int, max_length: int) -> None:
    """Write modules.json, 1_Pooling/config.json and sentence_bert_config.json, as sentence-transformers reads them.

    Args:
        folder: where to.
        pooling: what the file computes.
        width: C, channels of an embedding.
        max_length: the longest text that the model takes, in tokens.
    """
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * pooling.normalize
    modules = [
        dict(idx=index, name=str(index), path=path, type=f"sentence_transformers.models.{kind}")
        for index, (path, kind) in enumerate(kinds)
    ]
    names = (*_CONFIG_NAMES.values(), *_OTHER_CONFIG_NAMES)
    modes = {f"pooling_mode_{name}": name == _CONFIG_NAMES[pooling.mode] for name in names}
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", dict(word_embedding_dimension=width, **modes, include_prompt=True))
    _write(folder / "sentence_bert_config.json", dict(max_seq_length=max_length, do_lower_case=False))
    if pooling.normalize:
        (folder / "2_Normalize").mkdir()


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
