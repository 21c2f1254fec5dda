"""The meaning of ONNX Runtime's activations."""

from __future__ import annotations

import torch

from qcompile.codegen.onnx.ops.activation_ops import gelu, quick_gelu


def test_activations_by_their_formulas():
    x, bias = torch.linspace(-4, 4, 33)[:, None].repeat(1, 2), torch.tensor([0.5, -1.0])
    y = x + bias
    erf = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    tanh = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    assert torch.allclose(gelu(x, bias, "none"), erf, atol=1e-6) and torch.allclose(
        gelu(y, None, "none"), erf, atol=1e-6
    )
    assert torch.allclose(gelu(x, bias, "tanh"), tanh, atol=1e-6)
    assert torch.allclose(quick_gelu(x, 1.702), x / (1 + torch.exp(-1.702 * x)), atol=1e-6)
    assert torch.allclose(quick_gelu(x, 1.0), torch.nn.functional.silu(x), atol=1e-6)
