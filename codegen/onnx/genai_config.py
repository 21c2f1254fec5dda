"""genai_config.json: what onnxruntime-genai has to know to run a folder.

Everything is read from the exported graph (its caches) and the model's own token ids; the model type is
genai's generic "decoder".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "genai_config.json"


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder as onnxruntime-genai describes it.

    Attributes:
        layers: layers with a KV cache.
        heads: query heads.
        kv_heads: heads of the KV cache.
        head_size: channels of a head.
        hidden_size: channels of an embedding.
        vocabulary: V, tokens.
        positions: the longest text.
        shares_buffer: whether past and present may be one buffer, extended in place, as GroupQueryAttention does.
        chunk: tokens of a prompt that are read at once; None: all.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int
    vocabulary: int
    positions: int
    shares_buffer: bool
    chunk: int | None


def write_genai_config(folder: Path, decoder: DecoderConfig, token_sources: tuple[Any, ...]) -> None:
    """Write the file.

    Args:
        folder: where to.
        decoder: what the file describes.
        token_sources: configs that name the ids of special tokens, the first that has one counts; may be None.
    """

    def token(name: str) -> Any:
        ids = (getattr(source, name, None) for source in token_sources)
        return next((value for value in ids if value is not None), None)

    end, padding = token("eos_token_id"), token("pad_token_id")
    first_end = end[0] if isinstance(end, list) else end
    model = {
        "type": "decoder",
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": end,
        "pad_token_id": padding if padding is not None else first_end,
        "vocab_size": decoder.vocabulary,
        "context_length": decoder.positions,
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"provider_options": []},
            "head_size": decoder.head_size,
            "hidden_size": decoder.hidden_size,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "num_key_value_heads": decoder.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    model = {name: value for name, value in model.items() if value is not None}
    search: dict[str, Any] = {
        "max_length": decoder.positions,
        "do_sample": False,
        "past_present_share_buffer": decoder.shares_buffer,
    }
    if decoder.chunk is not None:
        search["chunk_size"] = decoder.chunk
    (folder / FILE).write_text(json.dumps({"model": model, "search": search}, indent=2) + "\n")
