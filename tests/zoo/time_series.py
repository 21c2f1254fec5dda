"""Time series and decisions."""

from __future__ import annotations

import torch
import transformers as tf

from zoo.architecture import Architecture

PATCHES = dict(
    num_input_channels=2, context_length=32, prediction_length=8, patch_length=8, patch_stride=8, d_model=64,
    num_hidden_layers=2,
)  # fmt: skip


def series():
    return {"past_values": torch.randn(2, 32, 2)}


def past_and_future():
    return {
        "past_values": torch.randn(2, 24),
        "past_time_features": torch.randn(2, 24, 1),
        "past_observed_mask": torch.ones(2, 24),
        "future_values": torch.randn(2, 8),
        "future_time_features": torch.randn(2, 8, 1),
    }


def forecaster(config):
    return config(
        prediction_length=8, context_length=20, lags_sequence=[1, 2, 3, 4], num_time_features=1, d_model=64,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
        decoder_attention_heads=4, scaling=False,
    )  # fmt: skip


def states():
    return {
        "states": torch.randn(2, 6, 5),
        "actions": torch.randn(2, 6, 3),
        "rewards": torch.randn(2, 6, 1),
        "returns_to_go": torch.randn(2, 6, 1),
        "timesteps": torch.arange(6).repeat(2, 1),
        "attention_mask": torch.ones(2, 6),
    }


TIME_SERIES = {
    "decision_transformer": Architecture(
        lambda: tf.DecisionTransformerModel(
            tf.DecisionTransformerConfig(
                state_dim=5, act_dim=3, hidden_size=64, max_ep_len=32, n_layer=2, n_head=4, vocab_size=1, n_positions=64
            )
        ),
        states,
        dynamic=False,
    ),
    "patchtsmixer": Architecture(
        lambda: tf.PatchTSMixerForPrediction(
            tf.PatchTSMixerConfig(**{k: v for k, v in PATCHES.items() if k != "num_hidden_layers"}, num_layers=2)
        ),
        series,
        dynamic=False,
    ),
    "patchtst": Architecture(
        lambda: tf.PatchTSTForPrediction(tf.PatchTSTConfig(num_attention_heads=4, ffn_dim=128, **PATCHES)),
        series,
        dynamic=False,
    ),
    "time_series_transformer": Architecture(
        lambda: tf.TimeSeriesTransformerModel(forecaster(tf.TimeSeriesTransformerConfig)),
        past_and_future,
        dynamic=False,
    ),
}
