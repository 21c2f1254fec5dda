"""Tokens one by one, text as it becomes readable, and conversations that keep their cache from turn to turn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch

Step = Callable[[np.ndarray, Any], tuple[np.ndarray, Any]]
"""ids [1, T] int64 behind a cache (None: from nothing) -> logits [1, .., V] and the grown cache."""


def stream(
    step: Step,
    ids: np.ndarray,
    new: int,
    *,
    cache: Any = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: set[int] | None = None,
) -> Generator[int, None, Any]:
    """New tokens after ids [1, T], one by one, up to one of `stop`; temperature 0 is greedy.

    Returns (as a generator does): the cache, which has seen every token but the last.
    """
    generator = np.random.default_rng(seed)
    for _ in range(new):
        logits, cache = step(ids, cache)
        scores = logits[0, -1].astype(np.float64)
        if temperature > 0:
            scores = np.exp((scores - scores.max()) / temperature)
            token = int(generator.choice(scores.size, p=scores / scores.sum()))
        else:
            token = int(scores.argmax())
        yield token
        if stop and token in stop:
            break
        ids = np.array([[token]], np.int64)
    return cache


def readable(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece; a character may span several tokens."""
    held: list[int] = []
    shown = ""
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def steps_of(model: torch.nn.Module) -> Step:
    """A causal LM of transformers as a Step."""

    def step(ids: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        with torch.no_grad():
            out = model(input_ids=torch.from_numpy(ids), past_key_values=cache, use_cache=True)
        return out.logits[:, -1:].float().numpy(), out.past_key_values

    return step


def ends_of(tokenizer: Any, model: torch.nn.Module | None = None) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's generation config names."""
    found = {tokenizer.eos_token_id}
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found |= set(named) if isinstance(named, list) else {named}
    return found - {None}


class Conversation:
    """Turns of a user and a model, in the chat template of the tokenizer.

    Only what is new since the last turn is read, where the template writes earlier turns as they were.
    """

    def __init__(
        self,
        step: Step,
        tokenizer: Any,
        *,
        system: str = "",
        new: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        stop: set[int] | None = None,
    ) -> None:
        """Begin; an answer has `new` tokens at most and ends at one of `stop` (None: the tokenizer's end).

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this tokenizer has no chat template: the model continues text (qcompile generate)")
        self.step, self.tokenizer = step, tokenizer
        self.new, self.temperature, self.seed = new, temperature, seed
        self.turns = [{"role": "system", "content": system}] if system else []
        self.seen: list[int] = []  # the tokens in the cache
        self.cache: Any = None
        self.stop = ends_of(tokenizer) if stop is None else stop

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to a turn, piece by piece."""
        self.turns.append({"role": "user", "content": text})
        written = self.tokenizer.apply_chat_template(self.turns, add_generation_prompt=True, tokenize=False)
        ids = list(self.tokenizer(written, add_special_tokens=False)["input_ids"])
        if ids[: len(self.seen)] != self.seen or len(ids) == len(self.seen):
            self.seen, self.cache = [], None
        tokens: list[int] = []

        def run() -> Iterator[int]:
            rest = np.array([ids[len(self.seen) :]], np.int64)
            made = stream(
                self.step, rest, self.new, cache=self.cache, temperature=self.temperature, seed=self.seed,
                stop=self.stop,
            )  # fmt: skip
            while True:
                try:
                    tokens.append(next(made))
                except StopIteration as end:
                    self.cache = end.value
                    return
                yield tokens[-1]

        pieces: list[str] = []
        for piece in readable(self.tokenizer, run()):
            pieces.append(piece)
            yield piece
        self.seen = ids + tokens[:-1]
        self.turns.append({"role": "assistant", "content": "".join(pieces)})
