"""An attention that does not match is an obstacle with the node and the reason."""

from __future__ import annotations

import pytest
from torch import fx

from qcompile.analysis.attention_scores import AttentionMatmul
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.mismatch import Mismatch, match_or_obstacle
from qcompile.codegen.onnx.fusions.partial_evaluation import UnknownInputError


def test_what_a_matcher_raises():
    graph = fx.Graph()
    scores, softmax = graph.placeholder("scores"), graph.placeholder("softmax")
    product = AttentionMatmul(scores, scores, scores, True, scores, 0)

    def raises(error):
        def match():
            raise error

        return match_or_obstacle(product, match)

    assert match_or_obstacle(product, lambda: "match") == "match"
    assert raises(Mismatch(softmax, "why")) == Obstacle("softmax", "why")
    assert raises(UnknownInputError("ids")) == Obstacle("scores", "depends on ids")
    with pytest.raises(ValueError, match="other"):
        raises(ValueError("other"))
