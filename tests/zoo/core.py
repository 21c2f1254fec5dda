"""The architectures that whole suites run over: every preset, ONNX, GPU lowering."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn

from zoo.architecture import PLAIN, SIZES, Architecture, decoder, pixels

OPT = dict(vocab_size=128, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2)
GPT2 = dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)

CORE = {
    "llama": decoder(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(tie_word_embeddings=True, **SIZES))),
    "mistral": decoder(lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES))),
    "qwen2": decoder(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES))),
    "qwen3": decoder(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(head_dim=16, **SIZES))),
    "gemma2": decoder(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(head_dim=16, **SIZES))),
    "gemma3": decoder(lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(head_dim=16, **SIZES))),
    "phi3": decoder(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES))),
    "opt": decoder(lambda: tf.OPTForCausalLM(tf.OPTConfig(num_attention_heads=4, max_position_embeddings=64, **OPT))),
    "gpt2": decoder(lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2))),
    "gpt_neox": decoder(lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**PLAIN))),
    "falcon": decoder(
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(
                vocab_size=128,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    ),
    "bloom": decoder(lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4))),
    "mixtral": decoder(lambda: tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=4, **SIZES))),
    "qwen2_moe": decoder(
        lambda: tf.Qwen2MoeForCausalLM(
            tf.Qwen2MoeConfig(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, **SIZES)
        )
    ),
    "bert": Architecture(lambda: tf.BertModel(tf.BertConfig(**{k: v for k, v in PLAIN.items() if "token" not in k}))),
    "vit": Architecture(
        lambda: tf.ViTModel(
            tf.ViTConfig(
                image_size=32,
                patch_size=8,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        ),
        pixels,
    ),
    "whisper_encoder": Architecture(
        lambda: tf.models.whisper.modeling_whisper.WhisperEncoder(
            tf.WhisperConfig(
                d_model=64,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=128,
                num_mel_bins=16,
                max_source_positions=32,
            )
        ),
        lambda: {"input_features": torch.randn(2, 16, 64)},
        dynamic=False,
    ),
    "mlp": Architecture(
        lambda: nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10)),
        lambda: {"input": torch.randn(6, 48)},
    ),
}
