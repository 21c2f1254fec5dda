"""The random models are what they say, and assert_equivalent finds a wrong rewrite and its node."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.ir.capture import capture
from qcompile.testing import Decoder, Shape, assert_equivalent, decoders, mlps, rotary, shapes, weights

SHAPE = Shape(12, 4, 2, 6, 16, 1, "rms", True, True, True, True, 0, rotary="half", qk_norm=True)


@given(shapes())
def test_a_decoder_is_its_shapes_and_its_seeds(shape):
    first, second = Decoder(shape), Decoder(shape)
    ids = first.example()
    assert ids.shape == (2, 5) and first(ids).shape == (2, 5, shape.vocabulary)
    assert torch.equal(first(ids), second(ids)) and (first.head.weight is first.embedding.weight) == shape.tied
    assert shape.heads % shape.kv_heads == 0 and not first.training


@given(decoders(), mlps(), weights())
def test_random_models_compute_finite_values(decoder, mlp, matrix):
    assert bool(torch.isfinite(decoder(decoder.example())).all())
    assert bool(torch.isfinite(mlp(torch.randn(3, mlp[0].in_features))).all()) and matrix.ndim == 2


@given(st.sampled_from(["half", "interleaved"]), st.sampled_from([4, 6, 8]))
def test_rotary_scores_depend_on_distance_only(pairs, size):
    q, k = (torch.randn(size, dtype=torch.float64).expand(1, 1, 9, size) for _ in range(2))
    scores = (rotary(q, pairs) @ rotary(k, pairs).transpose(-1, -2))[0, 0]
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal))


def test_a_wrong_rewrite_is_found_with_its_node():
    model = Decoder(SHAPE)
    before = capture(model, (model.example(),)).widened()
    assert_equivalent(before, before.copy(), [model.example()])
    after = before.copy()
    after.weights = {**after.weights, "blocks.0.up.weight": after.weights["blocks.0.up.weight"] * (1 + 1e-6)}
    with pytest.raises(AssertionError, match="the programs differ by .*, first at node"):
        assert_equivalent(before, after, [model.example()])
    assert_equivalent(before, after, [model.example()], tolerance=1e-3)


def test_modules_are_compared_in_their_own_dtype():
    model, other = Decoder(SHAPE), Decoder(dataclasses.replace(SHAPE, seed=1))
    ids = model.example()
    assert_equivalent(model, Decoder(SHAPE), [ids])
    with pytest.raises(AssertionError, match="the outputs differ by"):
        assert_equivalent(model, other, [ids])
