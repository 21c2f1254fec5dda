"""Specs of the kernels that round in training."""

from __future__ import annotations

import pytest

from qcompile.codegen.triton.kernels.training_spec import ChangeCodes, RoundGradient, RoundValues


def test_groups_are_padded_to_a_power_of_two():
    assert [ChangeCodes(group=group).width for group in (1, 2, 96, 256, 257)] == [1, 2, 128, 256, 512]
    with pytest.raises(ValueError, match="groups of 0 columns"):
        ChangeCodes(group=0)


def test_every_bit_is_defined():
    for spec in (ChangeCodes(), RoundGradient(), RoundValues()):
        assert spec.exact and spec.dtype == "fp32"
