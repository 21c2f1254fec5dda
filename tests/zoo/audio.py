"""Waves and spectrograms."""

from __future__ import annotations

import torch
import transformers as tf

from zoo.architecture import SHAPE, Architecture

WAVE = dict(
    conv_dim=[32, 32], conv_stride=[4, 4], conv_kernel=[8, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4, mask_time_prob=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0, vocab_size=32,
    num_codevectors_per_group=4, codevector_dim=16, proj_codevector_dim=16, **SHAPE,
)  # fmt: skip


def wave(make):
    return Architecture(make, lambda: {"input_values": torch.randn(2, 400)}, dynamic=False)


AUDIO = {
    "audio_spectrogram_transformer": Architecture(
        lambda: tf.ASTModel(
            tf.ASTConfig(patch_size=8, max_length=32, num_mel_bins=16, frequency_stride=8, time_stride=8, **SHAPE)
        ),
        lambda: {"input_values": torch.randn(2, 32, 16)},
        dynamic=False,
    ),
    "data2vec_audio": wave(lambda: tf.Data2VecAudioModel(tf.Data2VecAudioConfig(**WAVE))),
    "encodec": Architecture(
        lambda: tf.EncodecModel(
            tf.EncodecConfig(
                num_filters=8, hidden_size=32, num_residual_layers=1, upsampling_ratios=[4, 2], num_lstm_layers=1,
                codebook_size=16, codebook_dim=32, target_bandwidths=[24.0], sampling_rate=24000,
            )
        ),
        lambda: {"input_values": torch.randn(2, 1, 256)},
        dynamic=False,
    ),
    "hubert": wave(lambda: tf.HubertForCTC(tf.HubertConfig(**WAVE))),
    "moonshine": Architecture(
        lambda: tf.MoonshineForConditionalGeneration(
            tf.MoonshineConfig(
                vocab_size=128, hidden_size=64, intermediate_size=128, encoder_num_hidden_layers=2,
                decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
                max_position_embeddings=64, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )
        ),
        lambda: {"input_values": torch.randn(2, 2000), "decoder_input_ids": torch.randint(3, 128, (2, 5))},
        generates=True,
        dynamic=False,
    ),
    "sew": wave(lambda: tf.SEWModel(tf.SEWConfig(squeeze_factor=2, **WAVE))),
    "unispeech_sat": wave(lambda: tf.UniSpeechSatModel(tf.UniSpeechSatConfig(**WAVE))),
    "wav2vec2": wave(
        lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(do_stable_layer_norm=True, feat_extract_norm="layer", **WAVE))
    ),
    "wav2vec2_conformer": wave(
        lambda: tf.Wav2Vec2ConformerModel(tf.Wav2Vec2ConformerConfig(position_embeddings_type="relative", **WAVE))
    ),
    "wavlm": wave(lambda: tf.WavLMModel(tf.WavLMConfig(num_buckets=16, max_bucket_distance=32, **WAVE))),
}  # fmt: skip
