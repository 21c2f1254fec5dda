"""Rules: which names they match, and which are refused."""

from __future__ import annotations

import pytest

from qcompile.numerics.format import Format
from qcompile.recipe.rule import RecipeError, Rule


@pytest.mark.parametrize(
    "glob,names,found",
    [
        ("*.up.*", ["blocks.0.up.weight"], True),
        ("blocks.?.up.weight", ["blocks.0.up.weight"], True),
        ("blocks.[01].*", ["blocks.2.up.weight"], False),
        ("up", ["blocks.0.up.weight"], False),
        ("*UP*", ["blocks.0.up.weight"], False),
        ("head.*", ["table.weight", "head.weight"], True),
    ],
)
def test_globs(glob, names, found):
    assert Rule(glob, keep=True).matches(*names) == found


@pytest.mark.parametrize(
    "fields,words",
    [
        ({}, "does nothing. Fix: give keep=True, weight= or act="),
        ({"keep": True, "weight": Format("int8")}, "keeps the site float and gives it a format too. Fix: drop keep"),
        ({"keep": True, "act": "int8"}, "keeps the site float and gives it a format too"),
    ],
)
def test_rules_that_cannot_be_meant(fields, words):
    with pytest.raises(RecipeError, match=words):
        Rule("*", **fields)


def test_formats_may_be_text():
    assert Rule("*", weight="int4/group32", act="int8") == Rule(
        "*", weight=Format.parse("int4/group32"), act=Format("int8")
    )
    with pytest.raises(ValueError, match="int9"):
        Rule("*", weight="int9")
