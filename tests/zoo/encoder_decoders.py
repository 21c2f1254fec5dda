"""Encoder-decoders."""

from __future__ import annotations

import torch
import transformers as tf

from zoo.architecture import ROUTED, TOKENS, Architecture, pair_of_ids

BART = dict(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64, decoder_start_token_id=2, **TOKENS,
)  # fmt: skip
T5 = dict(
    vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def translator(make):
    return Architecture(make, pair_of_ids, generates=True)


def speech():
    return {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": torch.randint(3, 128, (2, 5))}


ENCODER_DECODERS = {
    "bart": translator(lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART))),
    "bigbird_pegasus": translator(
        lambda: tf.BigBirdPegasusForConditionalGeneration(
            tf.BigBirdPegasusConfig(attention_type="original_full", **BART)
        )
    ),
    "blenderbot": translator(lambda: tf.BlenderbotForConditionalGeneration(tf.BlenderbotConfig(**BART))),
    "fsmt": translator(
        lambda: tf.FSMTForConditionalGeneration(
            tf.FSMTConfig(
                src_vocab_size=128, tgt_vocab_size=128, langs=["en", "de"],
                **{k: v for k, v in BART.items() if k != "vocab_size"},
            )
        )
    ),
    "led": translator(
        lambda: tf.LEDForConditionalGeneration(
            tf.LEDConfig(
                attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
                **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            )
        )
    ),
    "longt5": translator(
        lambda: tf.LongT5ForConditionalGeneration(tf.LongT5Config(local_radius=3, encoder_attention_type="local", **T5))
    ),
    "m2m_100": translator(lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**BART))),
    "marian": translator(lambda: tf.MarianMTModel(tf.MarianConfig(**BART))),
    "mbart": translator(lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**BART))),
    "mt5": translator(lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**T5))),
    "nllb_moe": translator(
        lambda: tf.NllbMoeForConditionalGeneration(
            tf.NllbMoeConfig(num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, **BART)
        )
    ),
    "pegasus": translator(lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**BART))),
    "plbart": translator(lambda: tf.PLBartForConditionalGeneration(tf.PLBartConfig(**BART))),
    "prophetnet": translator(
        lambda: tf.ProphetNetForConditionalGeneration(
            tf.ProphetNetConfig(
                vocab_size=128, hidden_size=64, num_encoder_layers=2, num_encoder_attention_heads=4,
                encoder_ffn_dim=128,
                decoder_ffn_dim=128, num_decoder_layers=2, num_decoder_attention_heads=4, max_position_embeddings=64,
                decoder_start_token_id=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        )
    ),
    "speech_to_text": Architecture(
        lambda: tf.Speech2TextForConditionalGeneration(
            tf.Speech2TextConfig(
                max_source_positions=64, max_target_positions=64, input_feat_per_channel=16, conv_channels=32,
                **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            )
        ),
        lambda: {"input_features": torch.randn(2, 32, 16), "decoder_input_ids": torch.randint(3, 128, (2, 5))},
        generates=True,
    ),
    "switch_transformers": Architecture(
        lambda: tf.SwitchTransformersForConditionalGeneration(
            tf.SwitchTransformersConfig(
                num_experts=4, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, **T5
            )
        ),
        pair_of_ids,
        generates=True,
        bounds=ROUTED,  # 0.24 with one token in sixteen that another expert gets, 0.04 with the float model's choices
    ),
    "t5_gated": translator(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5)
        )
    ),
    "t5_seq2seq": translator(lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5))),
    "umt5": translator(lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**T5))),
    "whisper": Architecture(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                num_mel_bins=16, max_source_positions=32, max_target_positions=64, begin_suppress_tokens=None,
                suppress_tokens=None, **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            )
        ),
        speech,
        generates=True,
        dynamic=False,
    ),
}  # fmt: skip
