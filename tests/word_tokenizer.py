"""A tokenizer that knows the words of some files, for tests without a download."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def word_tokenizer(folder: Path) -> Any:
    """Every word and mark of the .jsonl files of a folder is a token; others are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl")))
    words = ["<unk>", "<s>", "</s>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
