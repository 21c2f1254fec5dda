"""Mixtures of experts."""

from __future__ import annotations

import transformers as tf

from zoo.architecture import ROUTED, SIZES, Architecture, decoder

LATENT = dict(kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
DEEPSEEK = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1,
    n_group=1, topk_group=1, **LATENT, **(SIZES | dict(num_key_value_heads=4)),
)  # fmt: skip

MIXTURES = {
    "dbrx": decoder(
        lambda: tf.DbrxForCausalLM(
            tf.DbrxConfig(
                d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=128,
                attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
                ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2, hidden_size=64),
            )
        )
    ),
    "deepseek_v2": decoder(lambda: tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**DEEPSEEK))),
    "deepseek_v3": decoder(lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**DEEPSEEK))),
    "ernie4_5_moe": decoder(
        lambda: tf.Ernie4_5_MoeForCausalLM(
            tf.Ernie4_5_MoeConfig(
                moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1,
                moe_layer_start_index=1, **SIZES,
            )
        )
    ),
    "gpt_oss": Architecture(
        lambda: tf.GptOssForCausalLM(
            tf.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=4, **SIZES)
        ),
        generates=True,
        bounds=ROUTED,  # 0.23 with one token in sixteen that another expert gets, 0.014 with the float model's choices
    ),
    "granitemoe": decoder(
        lambda: tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES))
    ),
    "jetmoe": decoder(
        lambda: tf.JetMoeForCausalLM(
            tf.JetMoeConfig(
                kv_channels=16, num_local_experts=4, num_experts_per_tok=2,
                **{k: v for k, v in SIZES.items() if k != "num_attention_heads"},
            )
        )
    ),
    "olmoe": decoder(lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(num_experts=4, num_experts_per_tok=2, **SIZES))),
    "phimoe": decoder(
        lambda: tf.PhimoeForCausalLM(tf.PhimoeConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES))
    ),
    "qwen3_moe": decoder(
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, **SIZES)
        )
    ),
}  # fmt: skip
