"""The arguments of an attention by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.codegen.sdpa_call import SDPACall
from qcompile.ir.capture import capture


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options) + 1


@pytest.mark.parametrize("masked", [False, True])
def test_arguments_by_position_and_by_name(masked):
    tensors = [torch.randn(1, 2, 3, 16) for _ in range(3)] + [torch.zeros(3, 3)] * masked
    options = dict(scale=0.5) if masked else dict(is_causal=True)
    program = capture(Attention(**options), tuple(tensors), {})
    add = program.outputs[0]
    call = SDPACall.of(add.args[0])
    assert [call.query, call.key, call.value] == program.inputs[:3]
    assert call.attn_mask is (program.inputs[3] if masked else None)
    assert call.is_causal == (not masked) and call.dropout_p == 0 and not call.enable_gqa
    assert call.score_scale == (0.5 if masked else 0.25), "16 channels: 1 / sqrt(16)"
    with pytest.raises(TypeError, match="add"):
        SDPACall.of(add)
