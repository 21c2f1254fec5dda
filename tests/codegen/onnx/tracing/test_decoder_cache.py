"""What a causal LM caches: keys and values, or a reason that names what else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build

import qcompile
from qcompile.codegen.onnx.tracing.decoder_cache import cache_layers
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError


def test_keys_and_values_of_a_decoder():
    layers = cache_layers(build("llama"))
    assert [layer.keys.shape[2] for layer in layers] == [2, 2]


@pytest.mark.parametrize(
    "model,reason",
    [
        (lambda: nn.Sequential(nn.Linear(8, 8)), "is not called as a causal LM is"),
        (lambda: build("bert"), "returns no keys and values"),
        (lambda: build("mamba"), "returns no keys and values"),
        (lambda: build("lfm2"), r"is a hybrid: .* recurrence in layer 0 \(LinearAttentionLayer\)"),
        (lambda: build("falcon_h1"), r"is a hybrid: .* recurrence in layer 0 \(LinearAttentionAndFullAttentionLayer\)"),
    ],
)
def test_what_has_no_such_cache_is_refused_before_it_is_quantized(model, reason, tmp_path):
    with pytest.raises(OnnxUnsupportedError, match=f"{reason}.*Fix: pass example="):
        qcompile.export_onnx(model(), tmp_path / "m", "w4a16", progress=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_hybrid_is_exported_without_a_cache(tmp_path):
    """Its attention and its recurrence read the whole text."""
    options = dict(example={"input_ids": torch.arange(2, 10)[None]}, progress=False)
    report = qcompile.export_onnx(build("lfm2"), tmp_path / "m", "w4a16", **options)
    assert report.metrics["onnx relative error"] < 1e-4


def test_an_owner_reads_the_weight_of_an_exported_linear(tmp_path):
    """As Mamba reads x_proj.weight: the file multiplies by the dequantized weight."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.read = nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x):
            return nn.functional.linear(self.first(x), self.read.weight, self.read.bias)

    report = qcompile.export_onnx(Owner(), tmp_path / "m", "int8", example=torch.randn(4, 64), progress=False)
    assert report.metrics["onnx relative error"] < 1e-4
