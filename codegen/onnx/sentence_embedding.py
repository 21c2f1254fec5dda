"""A sentence's embedding as an output of the file, and the files by which sentence-transformers knows the folder.

    mean    of the tokens that are no padding       cls    of the first token       last    of the last one

The tokens' own embeddings stay an output: sentence-transformers pools them itself, as 1_Pooling/config.json says,
and so comes to the same sentence_embedding that other callers read from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WAYS = ("mean", "cls", "last")
TOKENS, SENTENCE = "last_hidden_state", "sentence_embedding"

_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}  # as 1_Pooling/config.json calls them
_OTHERS = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


class PoolingError(ValueError):
    """A model or an example that has nothing to pool; the text says what is missing."""


@dataclass(frozen=True)
class Pooling:
    """How tokens become a sentence: one of WAYS, and whether the result has norm 1.

    Raises:
        PoolingError: an unknown way.
    """

    way: str
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise PoolingError(f"pooling {self.way!r} is unknown: use one of {', '.join(WAYS)}")

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens [B, T, C] float, mask [B, T] with 0 for padding -> [B, C]."""
        if self.way == "mean":
            weights = mask[..., None].to(tokens.dtype)
            found = (tokens * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
        elif self.way == "cls":
            found = tokens[:, 0]
        else:  # padding may lie before a text or behind it
            places = torch.arange(mask.shape[1], device=mask.device) * (mask != 0)
            found = tokens.gather(1, places.argmax(1)[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]
        return nn.functional.normalize(found, dim=-1) if self.normalize else found


class Pooled(nn.Module):
    """A model that gives its tokens' embeddings and the sentence's, and nothing else."""

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.config = getattr(model, "config", None)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the model, attention_mask [B, T] among them."""
        tokens = _tokens(self.model(**inputs))
        return {TOKENS: tokens, SENTENCE: self.pooling(tokens, inputs["attention_mask"])}


def _tokens(out: Any) -> Tensor:
    if isinstance(out, Mapping):
        if not isinstance(out.get(TOKENS), Tensor):
            raise PoolingError(
                f"pooling: the model gives {', '.join(map(str, out))}, and no {TOKENS}: "
                "give it without its head (transformers.AutoModel)"
            )
        return out[TOKENS]
    return out if isinstance(out, Tensor) else out[0]


def check_example(model: nn.Module, example: Any) -> None:
    """Refuse what cannot be pooled, before any work.

    Raises:
        PoolingError: no example, none with attention_mask, or a model that gives no embedding of each token.
    """
    if not isinstance(example, Mapping) or "attention_mask" not in example:
        raise PoolingError(
            "pooling needs example=.. with the model's keyword arguments, attention_mask [B, T] among them: "
            "give what the tokenizer makes of two texts with padding=True"
        )
    with torch.no_grad():
        tokens = _tokens(model(**example))
    if tokens.ndim != 3 or tokens.shape[:2] != example["attention_mask"].shape:
        raise PoolingError(
            f"pooling: the model gives {list(tokens.shape)} for texts of {list(example['attention_mask'].shape)} "
            "tokens, not one embedding for each token: export it without pooling"
        )


def write_pooling(folder: Path, pooling: Pooling, width: int, longest: int) -> None:
    """Write modules.json, 1_Pooling/config.json and sentence_bert_config.json, as sentence-transformers reads them.

    Args:
        width: of an embedding. longest: text that the model takes, in tokens.
    """
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * pooling.normalize
    modules = [
        dict(idx=index, name=str(index), path=path, type=f"sentence_transformers.models.{kind}")
        for index, (path, kind) in enumerate(kinds)
    ]
    modes = {f"pooling_mode_{mode}": mode == _MODES[pooling.way] for mode in (*_MODES.values(), *_OTHERS)}
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", dict(word_embedding_dimension=width, **modes, include_prompt=True))
    _write(folder / "sentence_bert_config.json", dict(max_seq_length=longest, do_lower_case=False))
    if pooling.normalize:
        (folder / "2_Normalize").mkdir()


def _write(path: Path, what: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(what, indent=2) + "\n")
