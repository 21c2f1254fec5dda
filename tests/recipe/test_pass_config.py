"""Configs of passes: formats may be given as text, whatever the field allows beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from qcompile.numerics.format import Format
from qcompile.passes import GPTQ, PerTensorActivations, Quantize
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.registry import registered


@dataclass(frozen=True)
class Config(PassConfig):
    form: Format
    maybe: Format | None = None
    name: str = "int8"


def test_text_becomes_a_format_where_one_is_meant():
    config = Config("int4/group32", "int8/row/zero")
    assert config.form == Format.parse("int4/group32") and config.maybe == Format.parse("int8/row/zero")
    assert config.name == "int8"
    assert Config(Format("fp8")).maybe is None


def test_bad_text_is_refused():
    with pytest.raises(ValueError, match="int9"):
        Config("int9")


def test_kinds_inherit_it():
    assert GPTQ("int4/group128/zero", "int8") == GPTQ(Format.parse("int4/group128/zero"), Format("int8"))
    assert Quantize("int8", None, lm_head=None).act is None
    assert dataclasses.is_dataclass(PerTensorActivations)


@pytest.mark.parametrize("kind", sorted(registered(), key=lambda k: k.__name__), ids=lambda k: k.__name__)
def test_configs_are_frozen_plain_data(kind):
    assert issubclass(kind, PassConfig)
    try:
        config = kind()
    except (TypeError, ValueError):  # has a field without a default
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        assert isinstance(value, (int, float, str, bool, tuple, Format, type(None))), field
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, value)
    assert hash(config) == hash(kind())
