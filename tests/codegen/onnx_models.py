"""Models that the ONNX tests export beside those of the zoo, their inputs, and the graphs of their files."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import pytest
import torch
import transformers as tf
from torch import nn
from zoo import ZOO, build, example

from qcompile.codegen.onnx.tracing.trace import Traced, trace

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
LENGTH = 64
"""Positions of the zoo's rotary tables."""

ENCODERS = {
    "t5": lambda: tf.T5EncoderModel(
        tf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "clip_text": lambda: tf.CLIPTextModel(
        tf.CLIPTextConfig(max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SMALL)
    ),
    "modernbert": lambda: tf.ModernBertModel(
        tf.ModernBertConfig(
            local_attention=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            cls_token_id=1, sep_token_id=2, **SMALL | dict(num_hidden_layers=4),
        )
    ),
    "swin": lambda: tf.SwinModel(
        tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    ),
}  # fmt: skip

ALIBI = {
    "bloom": ZOO["bloom"],  # slope times the index of the key, added inside the product
    "falcon": lambda: tf.FalconForCausalLM(  # the same rounded to bfloat16: no straight line
        tf.FalconConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "mpt": lambda: tf.MptForCausalLM(  # slope times the distance to the last one
        tf.MptConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=LENGTH, expansion_ratio=2)
    ),
}  # fmt: skip


def build_encoder(name: str) -> nn.Module:
    """One of ENCODERS or of the zoo."""
    return _build(name, ENCODERS)


def build_decoder(name: str) -> nn.Module:
    """One of ALIBI or of the zoo."""
    return _build(name, ALIBI)


def _build(name, others):
    with pytest.MonkeyPatch.context() as patch:
        for other, producer in others.items():
            patch.setitem(ZOO, other, producer)
        return build(name)


def encoder_inputs(name: str, padded: bool = False) -> dict[str, torch.Tensor]:
    """Keyword arguments; padded: with an attention_mask."""
    if name == "swin":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    inputs = example(name)
    if padded:
        inputs["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0
    return inputs


def trace_decoder(model: nn.Module) -> Traced:
    """A causal LM with its cache."""
    return trace(model, None, contrib_ops=True)


def trace_encoder(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Traced:
    """A module without a cache."""
    return trace(model, inputs, contrib_ops=True)


def scale_weights(model: nn.Module, factor: float, keep_embedding: bool = True) -> None:
    """Multiply all matrices: random ones are so small that a text repeats, and everybody attends to everybody."""
    with torch.no_grad():
        for parameter in model.parameters():
            embedding = model.get_input_embeddings().weight if keep_embedding else None
            if parameter.ndim == 2 and parameter is not embedding:
                parameter.mul_(factor)


def load_graph(folder: Path) -> tuple[onnx.GraphProto, collections.Counter[str]]:
    """The graph of a folder's file, and how many of each operator its top level has."""
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return graph, collections.Counter(node.op_type for node in graph.node)


def generated(model: nn.Module, ids: torch.Tensor, count: int = 12) -> list[int]:
    """What a model generates greedily."""
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()
