"""Text encoders: norms behind sums, shared layers, relative positions, no attention at all."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from zoo.architecture import ENCODER, PLAIN, Architecture

ROBERTA = dict(PLAIN, pad_token_id=1, max_position_embeddings=66)


def encoder(make):
    return Architecture(make)


def without(name: str) -> dict[str, Any]:
    """The usual sizes but one, which a configuration lacks."""
    return {k: v for k, v in ENCODER.items() if k != name}


ENCODERS = {
    "albert": encoder(lambda: tf.AlbertModel(tf.AlbertConfig(embedding_size=32, **ENCODER))),
    "bert_mlm": encoder(lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER))),
    "canine": encoder(
        lambda: tf.CanineModel(
            tf.CanineConfig(num_hash_buckets=64, local_transformer_stride=16, **without("vocab_size"))
        )
    ),
    "convbert": encoder(lambda: tf.ConvBertModel(tf.ConvBertConfig(embedding_size=64, **ENCODER))),
    "deberta": encoder(
        lambda: tf.DebertaModel(tf.DebertaConfig(relative_attention=True, pos_att_type=["c2p", "p2c"], **ENCODER))
    ),
    "deberta_v2": encoder(
        lambda: tf.DebertaV2Model(
            tf.DebertaV2Config(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, **ENCODER)
        )
    ),
    "distilbert": encoder(
        lambda: tf.DistilBertModel(
            tf.DistilBertConfig(
                vocab_size=128, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=64
            )
        )
    ),
    "electra": encoder(
        lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(embedding_size=32, num_labels=3, **ENCODER))
    ),
    "esm": encoder(
        lambda: tf.EsmModel(tf.EsmConfig(position_embedding_type="rotary", mask_token_id=3, **ENCODER))
    ),
    "fnet": encoder(
        lambda: tf.FNetModel(
            tf.FNetConfig(use_tpu_fourier_optimizations=False, **without("num_attention_heads"))
        )
    ),
    "funnel": encoder(
        lambda: tf.FunnelModel(
            tf.FunnelConfig(
                vocab_size=128, block_sizes=[1, 1], num_decoder_layers=1, d_model=64, n_head=4, d_head=16, d_inner=128
            )
        )
    ),
    "ibert": encoder(lambda: tf.IBertModel(tf.IBertConfig(**ROBERTA))),
    "layoutlm": encoder(lambda: tf.LayoutLMModel(tf.LayoutLMConfig(max_2d_position_embeddings=64, **ENCODER))),
    "longformer": encoder(lambda: tf.LongformerModel(tf.LongformerConfig(attention_window=4, **ROBERTA))),
    "mobilebert": encoder(
        lambda: tf.MobileBertModel(
            tf.MobileBertConfig(embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32, **ENCODER)
        )
    ),
    "modernbert": encoder(
        lambda: tf.ModernBertModel(
            tf.ModernBertConfig(local_attention=4, cls_token_id=1, sep_token_id=2, **PLAIN)
        )
    ),
    "mpnet": encoder(lambda: tf.MPNetModel(tf.MPNetConfig(**ROBERTA))),
    "perceiver": Architecture(
        lambda: tf.PerceiverForMaskedLM(
            tf.PerceiverConfig(
                num_latents=8, d_latents=64, d_model=32, num_blocks=1, num_self_attends_per_block=2,
                num_self_attention_heads=4, num_cross_attention_heads=4, vocab_size=128, max_position_embeddings=16,
                qk_channels=32, v_channels=64,
            )
        ),
        lambda: {"inputs": torch.randint(3, 128, (2, 16)), "attention_mask": torch.ones(2, 16)},
        dynamic=False,
    ),
    "reformer": Architecture(  # it draws random rotations in every call
        lambda: tf.ReformerModel(
            tf.ReformerConfig(
                attn_layers=["local", "lsh"], hidden_size=64, num_attention_heads=4, attention_head_size=16,
                feed_forward_size=128, vocab_size=128, axial_pos_shape=[4, 8], axial_pos_embds_dim=[32, 32],
                max_position_embeddings=32, local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_hashes=1,
                num_buckets=2, hash_seed=3, is_decoder=False,
            )
        ),
        lambda: {"input_ids": torch.randint(3, 128, (2, 32))},
        dynamic=False,
    ),
    "roberta": encoder(lambda: tf.RobertaModel(tf.RobertaConfig(**ROBERTA))),
    "roformer": encoder(lambda: tf.RoFormerModel(tf.RoFormerConfig(**ENCODER))),
    "squeezebert": encoder(lambda: tf.SqueezeBertModel(tf.SqueezeBertConfig(embedding_size=64, **ENCODER))),
    "t5_encoder": encoder(
        lambda: tf.T5EncoderModel(tf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))
    ),
    "xlm": encoder(
        lambda: tf.XLMModel(tf.XLMConfig(vocab_size=128, emb_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64))
    ),
}  # fmt: skip
