"""An exported ONNX folder as a model of lm-evaluation-harness, imported only where tasks run: it imports lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found,unused-ignore]
from lm_eval.utils import (  # type: ignore[import-not-found,unused-ignore]
    get_rolling_token_windows,
    make_disjoint_window,
)

from qcompile.generation.onnx_session import Session
from qcompile.generation.sampling_rules import SamplingRules

NEW_TOKENS = 256
"""Tokens that a task may generate where it does not say."""


class OnnxLM(TemplateLM):  # type: ignore[misc,unused-ignore]  # lm-eval has no types
    """Likelihoods and texts of a Session, one text at a time.

    Attributes:
        session: the folder.
        tokenizer: its tokenizer.
        max_length: tokens that are read at once.
    """

    def __init__(self, session: Session, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.session, self.tokenizer = session, tokenizer
        self.max_length = min(max_length, session.max_length or max_length)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = sorted(self.session.end_tokens)
        found = self.tokenizer.eos_token_id
        return int(found if found is not None else ends[0] if ends else 0)

    @property
    def prefix_token_id(self) -> int:
        """The token that the first one of a text is predicted from."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def tokenizer_name(self) -> str:
        """What caches of requests are named by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, without special ones unless asked for, as the harness does for causal models."""
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        options = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each context and continuation: log p(continuation | context), and whether it is the likeliest one."""
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        count = min(len(continuation), len(tokens) - 1)
        logits = self.session(input_ids=torch.tensor([tokens[:-1]]))[0, -count:].float()
        target = torch.tensor(tokens[-count:])
        total = float(logits.log_softmax(-1).gather(1, target[:, None]).sum())
        return total, bool((logits.argmax(-1) == target).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text) for each text, in windows that share no predicted token."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            totals.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to the first of its stop texts."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        count = int(options.get("max_gen_toks", NEW_TOKENS))
        sampled = options.get("do_sample", False)
        count = min(count, self.max_length - 1)
        ids = self.tok_encode(prompt)[-(self.max_length - count) :]
        end = {*self.session.end_tokens, self.eot_token_id}
        made: list[int] = []
        text = ""
        rules = SamplingRules(temperature=float(options.get("temperature", 1.0)) if sampled else 0.0)
        for token in self.session.stream(torch.tensor([ids]), count, rules=rules, stop=end):
            if token in end:
                break
            made.append(token)
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            if any(stop in text for stop in stops if stop):
                break
        places = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(places)] if places else text
