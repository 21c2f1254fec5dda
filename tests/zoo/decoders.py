"""Decoders that differ from the core's: how positions, norms, gates and heads are done."""

from __future__ import annotations

import transformers as tf

from zoo.architecture import PLAIN, SIZES, TOKENS, Architecture, decoder

GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TOKENS)

DECODERS = {
    "biogpt": decoder(lambda: tf.BioGptForCausalLM(tf.BioGptConfig(**PLAIN))),
    "codegen": decoder(lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(rotary_dim=8, n_ctx=64, **GPT))),
    "cohere": decoder(lambda: tf.CohereForCausalLM(tf.CohereConfig(use_qk_norm=True, **SIZES))),
    "cohere2": decoder(lambda: tf.Cohere2ForCausalLM(tf.Cohere2Config(sliding_window=4, **SIZES))),
    "ctrl": decoder(
        lambda: tf.CTRLLMHeadModel(
            tf.CTRLConfig(vocab_size=128, n_positions=64, n_embd=64, dff=128, n_layer=2, n_head=4)
        )
    ),
    "diffllama": decoder(lambda: tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**SIZES))),
    "exaone4": decoder(lambda: tf.Exaone4ForCausalLM(tf.Exaone4Config(sliding_window=4, **SIZES))),
    "gemma": decoder(lambda: tf.GemmaForCausalLM(tf.GemmaConfig(head_dim=16, **SIZES))),
    "glm4": decoder(lambda: tf.Glm4ForCausalLM(tf.Glm4Config(head_dim=16, **SIZES))),
    "gpt_bigcode": decoder(lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT))),
    "gpt_neo": decoder(
        lambda: tf.GPTNeoForCausalLM(
            tf.GPTNeoConfig(
                hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
                max_position_embeddings=64, **TOKENS,
            )
        )
    ),
    "gptj": decoder(lambda: tf.GPTJForCausalLM(tf.GPTJConfig(rotary_dim=8, **GPT))),
    "granite": decoder(
        lambda: tf.GraniteForCausalLM(
            tf.GraniteConfig(
                embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0, **SIZES
            )
        )
    ),
    "helium": decoder(lambda: tf.HeliumForCausalLM(tf.HeliumConfig(head_dim=16, **SIZES))),
    "mpt": decoder(
        lambda: tf.MptForCausalLM(
            tf.MptConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2)
        )
    ),
    "nemotron": decoder(lambda: tf.NemotronForCausalLM(tf.NemotronConfig(head_dim=16, **SIZES))),
    "olmo": decoder(lambda: tf.OlmoForCausalLM(tf.OlmoConfig(clip_qkv=4.0, **SIZES))),
    "olmo2": decoder(lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**SIZES))),
    "persimmon": decoder(lambda: tf.PersimmonForCausalLM(tf.PersimmonConfig(**PLAIN))),
    "phi": decoder(lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZES))),
    "smollm3": decoder(lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**SIZES))),
    "stablelm": decoder(
        lambda: tf.StableLmForCausalLM(
            tf.StableLmConfig(use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True, **SIZES)
        )
    ),
    "starcoder2": decoder(lambda: tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**SIZES))),
    "xglm": decoder(
        lambda: tf.XGLMForCausalLM(
            tf.XGLMConfig(
                d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, max_position_embeddings=64, **TOKENS
            )
        )
    ),
    "gemma3n": decoder(
        lambda: tf.Gemma3nForCausalLM(
            tf.Gemma3nTextConfig(
                head_dim=16, vocab_size_per_layer_input=128, hidden_size_per_layer_input=16, laurel_rank=8,
                num_kv_shared_layers=0, altup_num_inputs=2, layer_types=["sliding_attention", "full_attention"],
                activation_sparsity_pattern=[0.5, 0.0], **SIZES,
            )
        )
    ),
    "imagegpt": Architecture(
        lambda: tf.ImageGPTForCausalImageModeling(
            tf.ImageGPTConfig(vocab_size=129, n_positions=64, n_embd=64, n_layer=2, n_head=4)
        )
    ),
    "xlnet": Architecture(
        lambda: tf.XLNetLMHeadModel(
            tf.XLNetConfig(vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=128, bos_token_id=1, eos_token_id=2)
        )
    ),
}  # fmt: skip
