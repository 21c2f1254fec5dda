"""State-space and recurrent models, and hybrids of them with attention."""

from __future__ import annotations

import transformers as tf

from zoo.architecture import SIZES, TOKENS, decoder

STATE = dict(num_hidden_layers=2, state_size=8, expand=2, conv_kernel=4)

HYBRIDS = {
    "bamba": decoder(
        lambda: tf.BambaForCausalLM(
            tf.BambaConfig(
                attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
                mamba_expand=2, mamba_chunk_size=8, **SIZES,
            )
        )
    ),
    "falcon_mamba": decoder(
        lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(hidden_size=64, time_step_rank=4, **STATE, **TOKENS))
    ),
    "falcon_h1": decoder(
        lambda: tf.FalconH1ForCausalLM(
            tf.FalconH1Config(
                mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
                mamba_chunk_size=8, **SIZES,
            )
        )
    ),
    "jamba": decoder(
        lambda: tf.JambaForCausalLM(
            tf.JambaConfig(
                attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
                mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, **SIZES,
            )
        )
    ),
    "lfm2": decoder(
        lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(layer_types=["conv", "full_attention"], block_multiple_of=32, **SIZES))
    ),
    "mamba": decoder(lambda: tf.MambaForCausalLM(tf.MambaConfig(hidden_size=64, time_step_rank=4, **STATE, **TOKENS))),
    "mamba2": decoder(
        lambda: tf.Mamba2ForCausalLM(
            tf.Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, n_groups=1, chunk_size=8, **STATE, **TOKENS)
        )
    ),
    "minimax": decoder(
        lambda: tf.MiniMaxForCausalLM(
            tf.MiniMaxConfig(
                num_local_experts=4, head_dim=16, layer_types=["linear_attention", "full_attention"], block_size=8,
                **SIZES,
            )
        )
    ),
    "qwen3_next": decoder(
        lambda: tf.Qwen3NextForCausalLM(
            tf.Qwen3NextConfig(
                head_dim=16, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
                linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                shared_expert_intermediate_size=32, layer_types=["linear_attention", "full_attention"], **SIZES,
            )
        )
    ),
    "recurrent_gemma": decoder(
        lambda: tf.RecurrentGemmaForCausalLM(
            tf.RecurrentGemmaConfig(
                lru_width=64, attention_window_size=16, conv1d_width=4, block_types=["recurrent", "attention"],
                **{k: v for k, v in SIZES.items() if k != "max_position_embeddings"},
            )
        )
    ),
    "rwkv": decoder(
        lambda: tf.RwkvForCausalLM(
            tf.RwkvConfig(
                vocab_size=128, context_length=64, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64,
                intermediate_size=128, bos_token_id=1, eos_token_id=2,
            )
        )
    ),
    "zamba": decoder(
        lambda: tf.ZambaForCausalLM(
            tf.ZambaConfig(
                mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2, attn_layer_period=2, attn_layer_offset=1,
                use_mamba_kernels=False, **(SIZES | dict(num_hidden_layers=6)),
            )
        )
    ),
    "zamba2": decoder(
        lambda: tf.Zamba2ForCausalLM(
            tf.Zamba2Config(
                mamba_d_state=8, mamba_headdim=16, mamba_ngroups=1, n_mamba_heads=8, chunk_size=8, num_mem_blocks=1,
                layers_block_type=["mamba", "hybrid"], use_mamba_kernels=False, adapter_rank=8, **SIZES,
            )
        )
    ),
}  # fmt: skip
