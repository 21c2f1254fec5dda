"""Generation: token by token, text as it becomes readable, and conversations that keep their cache between turns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from qcompile.generation.sampling_rules import SamplingRules
from qcompile.modules.cache_argument import returned_cache, with_cache

Step = Callable[[np.ndarray, Any], tuple[np.ndarray, Any]]
"""Token ids [1, S] int64 and a cache (None: empty) -> logits [1, .., V] and the cache with these tokens."""


def stream(
    step: Step,
    ids: np.ndarray,
    max_new_tokens: int,
    *,
    cache: Any = None,
    before: Sequence[int] = (),
    rules: SamplingRules | None = None,
    stop: set[int] | None = None,
) -> Generator[int, None, Any]:
    """Generate tokens one by one.

    Args:
        step: the model.
        ids: the prompt [1, S], or what of it is not in the cache.
        max_new_tokens: where to end.
        cache: keys and values of tokens that the model has read before.
        before: those tokens.
        rules: of the sampling; None is greedy.
        stop: tokens that end the text; they are yielded too.

    Yields:
        Tokens.

    Returns:
        As generators do: the cache, which has every token but the last.

    Raises:
        ValueError: no prompt.
    """
    if not ids.size:
        raise ValueError("the prompt is empty. Fix: give at least one token")
    chosen = SamplingRules() if rules is None else rules
    processors, generator, text = chosen.processors(), chosen.generator(), [*before, *ids[0].tolist()]
    for _ in range(max_new_tokens):
        logits, cache = step(ids, cache)
        scores = torch.from_numpy(logits[:, -1].astype(np.float32))
        token = chosen.draw(torch.tensor([text]), scores, processors, generator)
        text.append(token)
        yield token
        if stop and token in stop:
            break
        ids = np.array([[token]], np.int64)
    return cache


def new_tokens(prompt: int, most: int, max_length: int | None) -> int:
    """How many tokens of `most` fit behind a prompt. Raises ValueError where the prompt fills the context."""
    if max_length is not None and prompt >= max_length:
        raise ValueError(f"a text of {prompt} tokens: the context of the model ends at {max_length}. Fix: shorten it")
    return most if max_length is None else min(most, max_length - prompt)


def readable_text(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece; a character may span several tokens."""
    read: list[int] = []
    shown = ""
    for token in tokens:
        read.append(token)
        text = tokenizer.decode(read, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def step_function(model: torch.nn.Module) -> Step:
    """A causal LM of transformers as a Step; it gives the logits of the last token."""

    def step(ids: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        with torch.no_grad():
            out = model(**with_cache(model, {"input_ids": torch.from_numpy(ids), "use_cache": True}, cache))
        return out.logits[:, -1:].float().numpy(), returned_cache(out)

    return step


def print_answer(
    model: Any, tokenizer: Any, ids: np.ndarray, max_new_tokens: int, rules: SamplingRules, stop: set[int]
) -> None:
    """Print what a model of transformers continues a prompt with, as it comes, by its own `generate()`.

    Args:
        model: a causal LM, also a compiled or a packaged one.
        tokenizer: its tokenizer.
        ids: the prompt, int64 [1, S].
        max_new_tokens: where to end.
        rules: of the sampling.
        stop: tokens that end the text.
    """
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = torch.from_numpy(ids).to(model.device)
    config = rules.generation_config(max_new_tokens, stop)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(rules.torch_seed)
        model.generate(given, attention_mask=torch.ones_like(given), generation_config=config, streamer=streamer)


def end_tokens(tokenizer: Any, model: torch.nn.Module | None = None) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's generation config names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return found - {None}


class Conversation:
    """Turns of a user and a model, in the chat template of the tokenizer.

    Only what is new since the last turn is read, where the template writes earlier turns the same again.

    Attributes:
        turns: messages, as chat templates take them.
        cached_tokens: the tokens in the cache, always: also while an answer is read, and after one that is not read to
            its end.
    """

    def __init__(
        self,
        step: Step,
        tokenizer: Any,
        *,
        system: str = "",
        max_new_tokens: int = 512,
        rules: SamplingRules | None = None,
        stop: set[int] | None = None,
        max_length: int | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            step: the model.
            tokenizer: of transformers, with a chat template.
            system: the system message; "" for none.
            max_new_tokens: of one answer.
            rules: of the sampling; None is greedy.
            stop: tokens that end an answer; None for the tokenizer's.
            max_length: tokens that the model reads at once; None: it has no limit.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "this tokenizer has no chat template: the model continues text. Fix: use qcompile generate, or a model "
                "that was trained for conversations"
            )
        self.step, self.tokenizer = step, tokenizer
        self.max_new_tokens, self.rules = max_new_tokens, rules
        self.max_length = max_length
        self.turns = [{"role": "system", "content": system}] if system else []
        self.cached_tokens: list[int] = []
        self.cache: Any = None
        self._answering: Generator[str, None, None] | None = None
        self.stop = end_tokens(tokenizer) if stop is None else stop

    def answer(self, text: str) -> Generator[str, None, None]:
        """The model's answer to a turn of the user, piece by piece.

        An answer that is not read to its end ends where reading stopped, at the latest when the next one begins. A
        turn whose answer fails is forgotten.
        """
        if self._answering is not None:
            self._answering.close()
        self._answering = self._answer(text)
        return self._answering

    def _answer(self, text: str) -> Generator[str, None, None]:
        before, pieces = list(self.turns), list[str]()
        self.turns.append({"role": "user", "content": text})
        try:
            written = self.tokenizer.apply_chat_template(self.turns, add_generation_prompt=True, tokenize=False)
            ids = list(self.tokenizer(written, add_special_tokens=False)["input_ids"])
            new = new_tokens(len(ids), self.max_new_tokens, self.max_length)
            if ids[: len(self.cached_tokens)] != self.cached_tokens or len(ids) == len(self.cached_tokens):
                self.cached_tokens, self.cache = [], None
            rest = np.array([ids[len(self.cached_tokens) :]], np.int64)
            tokens = stream(
                self._read,
                rest,
                new,
                cache=self.cache,
                before=self.cached_tokens,
                rules=self.rules,
                stop=self.stop,
            )
            for piece in readable_text(self.tokenizer, tokens):
                pieces.append(piece)
                yield piece
        except GeneratorExit:  # not read to its end
            self.turns.append({"role": "assistant", "content": "".join(pieces)})
            raise
        except BaseException:  # a cache that grows in place may have some of the layers' tokens
            self.turns, self.cached_tokens, self.cache = before, [], None
            raise
        self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _read(self, ids: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """A step, after which the conversation knows what the cache has."""
        logits, self.cache = self.step(ids, cache)
        self.cached_tokens = [*self.cached_tokens, *ids[0].tolist()]
        return logits, self.cache
