"""Windows and biases of positions are measured."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from onnx_models import LENGTH, build_decoder, trace_decoder
from small_decoder import SmallDecoder, trace_small_decoder
from zoo import SIZES

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.match_gqa import GroupQueryAttentionMatch, match_group_query_attentions


def test_a_window_is_measured():
    torch.manual_seed(0)
    model = tf.MistralForCausalLM(tf.MistralConfig(sliding_window=5, **SIZES)).eval()
    found = match_group_query_attentions(trace_decoder(model).program, LENGTH)
    assert [a.window for a in found] == [5, 5]


@pytest.mark.parametrize(
    "hide,window",
    [(lambda distance: distance >= 6, 6), (lambda distance: distance < 0, -1), (lambda distance: distance == 2, None)],
)
def test_only_what_is_far_away_may_be_hidden(hide, window):
    (found,) = match_group_query_attentions(trace_small_decoder(SmallDecoder(hide=hide)), LENGTH)
    if window is None:
        assert isinstance(found, Obstacle) and "the mask is not causal" in found.reason
    else:
        assert isinstance(found, GroupQueryAttentionMatch) and found.window == window


def test_the_slopes_of_the_heads():
    found = match_group_query_attentions(trace_decoder(build_decoder("bloom")).program, LENGTH)
    slopes = 2.0 ** -torch.arange(2.0, 10, 2)  # ALiBi's for four heads
    for attention in found:
        assert isinstance(attention, GroupQueryAttentionMatch)
        assert attention.softcap == 0 and attention.scale == pytest.approx(0.25)
        assert attention.bias.shape == (4, LENGTH) and attention.window == -1
        assert torch.allclose(attention.bias, slopes[:, None] * (torch.arange(LENGTH) - LENGTH + 1), atol=1e-5)
