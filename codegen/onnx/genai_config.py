"""genai_config.json: what onnxruntime-genai has to know to run a folder as it is.

Everything is read off the exported graph (its caches) and the model's own token ids; the model type is
genai's generic "decoder".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "genai_config.json"


def write_genai_config(
    folder: Path,
    config: Any,
    generation: Any,
    *,
    layers: int,
    heads: int,
    groups: int,
    size: int,
    vocabulary: int,
    hidden: int,
    positions: int,
    in_place: bool,
    chunk: int | None,
) -> None:
    """Write the file.

    Args:
        config, generation: where the ids of special tokens are looked up, generation first; may be None.
        layers: with a cache. heads, groups: of queries and of the cache; size: of a head.
        positions: the longest text. in_place: whether a cache may be extended in the buffer that it came in,
            which GroupQueryAttention does. chunk: how many tokens of a prompt are read at once; None is all.
    """

    def token(name: str) -> Any:
        for source in (generation, config):
            value = getattr(source, name, None)
            if value is not None:
                return value
        return None

    end = token("eos_token_id")
    pad = token("pad_token_id")
    first_end = end[0] if isinstance(end, list) else end
    model = {
        "type": "decoder",
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": end,
        "pad_token_id": pad if pad is not None else first_end,
        "vocab_size": vocabulary,
        "context_length": positions,
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"provider_options": []},
            "head_size": size,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": groups,
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
    search = {"max_length": positions, "do_sample": False, "past_present_share_buffer": in_place}
    if chunk is not None:
        search["chunk_size"] = chunk
    (folder / FILE).write_text(json.dumps({"model": model, "search": search}, indent=2) + "\n")
