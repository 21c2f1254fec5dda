"""The files beside model.onnx: what onnxruntime-genai, sentence-transformers and transformers read of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qcompile.codegen.onnx.genai_config import DecoderConfig, write_genai_config
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.codegen.onnx.ops.attention_ops import GroupQueryAttentionCall
from qcompile.codegen.onnx.sentence_embedding import write_pooling
from qcompile.codegen.onnx.tracing.cached_decoder import CachedDecoder
from qcompile.codegen.onnx.tracing.trace import Traced
from qcompile.ir.program import Program

_NO_LIMIT = 2**30  # tokens, where a tokenizer sets no limit


def write_folder_files(folder: Path, traced: Traced, options: OnnxOptions, tokenizer: Any) -> None:
    """Write them.

    Args:
        folder: where to.
        traced: a module, and its rewritten program.
        options: what kind of file.
        tokenizer: saved too; None: there is none.
    """
    model = traced.module.model
    config, generation_config = getattr(model, "config", None), getattr(model, "generation_config", None)
    if isinstance(traced.module, CachedDecoder):
        decoder = _decoder_config(traced.module, traced.program, options.chunk)
        write_genai_config(folder, decoder, (generation_config, config))
    if (pooling := options.sentence_pooling) is not None:
        width = int(traced.program.outputs[0].meta["val"].shape[-1])
        max_length = min(traced.positions, getattr(tokenizer, "model_max_length", _NO_LIMIT))
        write_pooling(folder, pooling, width, max_length)
    for part in (config, generation_config, tokenizer):
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(str(folder))


def _decoder_config(decoder: CachedDecoder, program: Program, chunk: int | None) -> DecoderConfig:
    """What the graph says of a decoder.

    A cache in a buffer of the greatest length, extended in place, has no length of its own any more: it can be one only
    where nothing but the attentions reads that length.
    """
    kv_heads, head_size = decoder.cache_shapes[0]
    attentions = dict(GroupQueryAttentionCall.find(program))
    consumers = {user for cache in program.inputs[2:] for user in cache.users if user not in attentions}
    return DecoderConfig(
        layers=len(decoder.cache_shapes) // 2,
        heads=max((call.heads for call in attentions.values()), default=kv_heads),
        kv_heads=kv_heads,
        head_size=head_size,
        hidden_size=decoder.model.get_input_embeddings().embedding_dim,
        vocabulary=int(program.outputs[0].meta["val"].shape[-1]),
        positions=decoder.positions,
        shares_buffer=all(user.target is torch.ops.aten.sym_size.int and user.args[1] != 2 for user in consumers),
        chunk=chunk,
    )
