"""The meaning of ONNX Runtime's norms."""

from __future__ import annotations

import torch

from qcompile.codegen.onnx.ops.norm_ops import rms_norm, skip_layer_norm, skip_rms_norm


def test_norms_of_a_sum():
    torch.manual_seed(0)
    x, skip, gain, shift, bias = *torch.randn(2, 3, 8), *torch.randn(3, 8)
    total = x + skip
    want = total / (total.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * gain
    assert torch.allclose(rms_norm(total, gain, 1e-3), want, atol=1e-6)
    for got, expected in zip(skip_rms_norm(x, skip, gain, 1e-3), (want, total), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)
    for b, s in ((None, None), (bias, shift)):
        total = x + skip + (0 if b is None else b)
        centered = total - total.mean(-1, keepdim=True)
        want = centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * gain + (0 if s is None else s)
        for got, expected in zip(skip_layer_norm(x, skip, gain, s, b, 1e-3), (want, total), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)
