"""Casts of a model change the dtype of some buffers only; moves change the device of all."""

from __future__ import annotations

import pytest
import torch

from qcompile.modules.fixed_dtype import FixedDtypeModule


class Some(FixedDtypeModule):
    FIXED_DTYPE = ("codes", "scale", "absent")

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.ones(2).to(torch.float8_e4m3fn))  # a cast takes fp8 for floating point
        self.register_buffer("scale", torch.full((2,), 1e-9))
        self.register_buffer("bias", torch.ones(2))
        self.register_buffer("absent", None)


class All(Some):
    FIXED_DTYPE = None


def test_named_buffers_keep_their_dtype_and_values():
    outer = torch.nn.Sequential(Some(), All()).half().bfloat16()
    for module in outer:
        assert module.codes.dtype == torch.float8_e4m3fn and module.scale.tolist() == torch.full((2,), 1e-9).tolist()
        assert module.scale.dtype == torch.float32 and module.absent is None
    assert outer[0].bias.dtype == torch.bfloat16 and outer[1].bias.dtype == torch.float32


def test_moves_apply_to_all():
    moved = Some().to("meta")
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert Some().to("meta", torch.float16).scale.dtype == torch.float32


def test_a_state_dict_of_another_format_is_refused():
    """Codes of fp8 and of int8 have the same shape: torch would cast one to the other."""
    state = Some().state_dict()
    assert Some().load_state_dict(state).missing_keys == []
    state["codes"] = torch.ones(2, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="codes is torch.int8, and must be torch.float8_e4m3fn: it is of another"):
        Some().load_state_dict(state)
    cast = {**Some().state_dict(), "bias": torch.ones(2).half()}
    assert Some().load_state_dict(cast).missing_keys == []
