"""How the next token is drawn, in transformers' own terms: for its `generate()`, and for tokens one by one.

Both draw the same tokens: logits are processed by the same classes in the same order, and drawn by the same call from a
generator with the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_MOST_TOKENS = 10_000_000  # of any vocabulary
_SEEDS = 2**63  # that a generator takes


def _rule(default: _T, meaning: str) -> _T:
    """A dataclass field with a help text, which the command line shows too."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """How tokens are drawn.

    Raises:
        ValueError: a value that is out of its range.
    """

    temperature: float = _rule(0.0, "of the sampling; 0 is greedy")
    top_k: int | None = _rule(None, "draw from the K most likely tokens only")
    top_p: float | None = _rule(None, "draw from the most likely tokens that together have this probability")
    min_p: float | None = _rule(None, "draw from tokens that have this share of the largest probability, or more")
    repetition_penalty: float | None = _rule(None, "divide the scores of tokens that were used before; above 1")
    seed: int = _rule(0, "of the sampling")

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: it is 0 (greedy) or a finite value above")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: it is 0 or more")
        if self.top_k is not None and not 1 <= self.top_k <= _MOST_TOKENS:
            raise ValueError(f"top_k={self.top_k}: it is 1 to {_MOST_TOKENS} tokens")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}={share}: it is a share above 0, and at most 1")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: it is a finite value above 0")
        drawn = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if drawn and not self.temperature:
            raise ValueError(f"{drawn[0]} is of sampling, and temperature=0 is greedy. Fix: give a temperature, as 1.0")

    def generation_config(self, tokens: int, end: Collection[int]) -> Any:
        """For `generate()` of transformers.

        Args:
            tokens: new ones at most.
            end: tokens that end a text.
        """
        from transformers import GenerationConfig

        ends = sorted(end)
        pad = ends[0] if ends else 0  # one text is never padded; without it generate() warns
        options: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": ends or None, "pad_token_id": pad}
        options["repetition_penalty"] = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        options["do_sample"] = self.temperature > 0
        if self.temperature:  # values that are not given would be those of the checkpoint, or 50 tokens
            options |= {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
            options["min_p"] = self.min_p or 0.0
        return GenerationConfig(**options)

    def processors(self) -> list[Any]:
        """What changes logits before a token is drawn, in transformers' order: each takes ids and scores [1, V]."""
        if self == SamplingRules(seed=self.seed):
            return []
        import transformers

        made: list[Any] = []
        if self.repetition_penalty is not None:
            made.append(transformers.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature:
            made.append(transformers.TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            made.append(transformers.TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            made.append(transformers.TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            made.append(transformers.MinPLogitsWarper(self.min_p))
        return made

    def generator(self) -> torch.Generator:
        """A generator with the seed."""
        return torch.Generator().manual_seed(self.torch_seed)

    @property
    def torch_seed(self) -> int:
        """The seed as a generator of torch takes it."""
        return self.seed % _SEEDS

    def draw(self, ids: Tensor, logits: Tensor, processors: list[Any], generator: torch.Generator) -> int:
        """One token.

        Args:
            ids: the text so far, int64 [1, T].
            logits: float [1, V].
            processors: of these rules.
            generator: of these rules.
        """
        for process in processors:
            logits = process(ids, logits)
        if not self.temperature:
            return int(logits.argmax(-1))
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
