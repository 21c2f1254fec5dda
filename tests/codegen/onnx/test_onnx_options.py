"""Options of an ONNX file: described once, checked before any work."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

import pytest

from qcompile.codegen.onnx.onnx_options import OnnxKeywords, OnnxOptions
from qcompile.codegen.onnx.sentence_embedding import Pooling, PoolingError
from qcompile.recipe.recipe import RecipeError


def test_the_keywords_of_the_function_are_the_fields():
    assert get_type_hints(OnnxKeywords) == get_type_hints(OnnxOptions)


def test_every_field_has_a_default_and_a_help_text():
    for field in dataclasses.fields(OnnxOptions):
        assert field.default is not dataclasses.MISSING and len(field.metadata["help"]) > 20, field.name


@pytest.mark.parametrize(
    "options,error,words",
    [
        (dict(accuracy_level=2), RecipeError, "accuracy_level 2 is unknown"),
        (dict(accuracy_level=1, contrib_ops=False), RecipeError, "session.qdq_matmulnbits_accuracy_level"),
        (dict(chunk=0), RecipeError, "1 or more, got 0"),
        (dict(chunk=-4), RecipeError, "1 or more, got -4"),
        (dict(normalize=True), RecipeError, "give pooling="),
        (dict(pooling="max"), PoolingError, "mean, cls, last"),
    ],
)
def test_impossible_values_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        OnnxOptions.of(options)


@pytest.mark.parametrize("options,words", [(dict(last_logits=True), "no last token"), (dict(chunk=8), "for decoders")])
def test_options_of_decoders_are_refused_for_encoders(options, words):
    with pytest.raises(RecipeError, match=words):
        OnnxOptions.of(options).check_encoder()
    OnnxOptions(pooling="cls", normalize=True).check_encoder()


def test_an_unknown_name_is_a_type_error_with_the_nearest():
    with pytest.raises(TypeError, match="'low_memroy': did you mean low_memory"):
        OnnxOptions.of({"low_memroy": True})
    with pytest.raises(TypeError, match="options are accuracy_level, low_memory"):
        OnnxOptions.of({"xyz": True})


def test_the_pooling_is_the_module_that_computes_it():
    assert OnnxOptions().sentence_pooling is None
    assert OnnxOptions(pooling="mean", normalize=True).sentence_pooling == Pooling("mean", True)
