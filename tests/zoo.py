"""Tiny random configurations of many architectures; names are allowed here and nowhere else. And short recipes."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
import transformers as tf
from torch import nn

from qcompile.passes import AWQ, SmoothQuantPlus, SpinQuant

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
PLAIN = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
OPT = dict(vocab_size=128, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2)
GPT2 = dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)

ZOO = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(tie_word_embeddings=True, **SIZES)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(head_dim=16, **SIZES)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(head_dim=16, **SIZES)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(head_dim=16, **SIZES)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(num_attention_heads=4, max_position_embeddings=64, **OPT)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**PLAIN)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=4, **SIZES)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, **SIZES)
    ),
    "bert": lambda: tf.BertModel(tf.BertConfig(**{k: v for k, v in PLAIN.items() if "token" not in k})),
    "vit": lambda: tf.ViTModel(
        tf.ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ),
    "whisper_encoder": lambda: tf.models.whisper.modeling_whisper.WhisperEncoder(
        tf.WhisperConfig(
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            num_mel_bins=16,
            max_source_positions=32,
        )
    ),
    "mlp": lambda: nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10)),
}


def build(name: str) -> nn.Module:
    """A model with random gains and biases: a gain of one would hide most mistakes."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ZOO[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.requires_grad_(False)


def example(name: str) -> dict[str, torch.Tensor]:
    """Inputs with two rows."""
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "whisper_encoder":
        return {"input_features": torch.randn(2, 16, 64)}
    if name == "mlp":
        return {"input": torch.randn(6, 48)}
    return {"input_ids": torch.randint(3, 128, (2, 8))}


def is_dynamic(name: str) -> bool:
    """Whether the architecture takes any length (one that checks its input length does not)."""
    return name != "whisper_encoder"


def brief(recipe):
    """A recipe whose searches are short: what it does is tested, not how well."""
    short = {SpinQuant: {"steps": 4}, AWQ: {"steps": 4}, SmoothQuantPlus: {"step": 0.5}}
    return replace(recipe, passes=tuple(replace(c, **short.get(type(c), {})) for c in recipe.passes))
