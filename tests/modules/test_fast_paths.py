"""Transformer layers of PyTorch call the modules that took the place of their linears, in every mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qcompile
from qcompile.modules.fast_paths import leave_fast_paths

X = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(8).expand(4, 8) >= torch.tensor([8, 5, 7, 8])[:, None]


def encoder(seed=0):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 16)).eval()


class Called(nn.Module):
    """Counts its calls, and shows a plain weight."""

    def __init__(self, inner):
        super().__init__()
        self.weight, self.bias, self.count = inner.weight, inner.bias, 0

    def forward(self, input):
        self.count += 1
        return nn.functional.linear(input, self.weight, self.bias)


def calls_of_second_layer(leave):
    """Calls of a replaced linear in evaluation without gradients, with and without padding, and the outputs."""
    model = encoder()[1]
    model.layers[1].linear2 = called = Called(model.layers[1].linear2)
    if leave:
        leave_fast_paths(model, "layers.1.linear2")
    with torch.no_grad():
        return [(model(X), called.count), (model(X, src_key_padding_mask=PADDING), called.count)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_replaced_linear_is_called_and_the_output_is_the_same():
    fast, called = calls_of_second_layer(False), calls_of_second_layer(True)
    assert [count for _, count in fast] == [0, 0] and [count for _, count in called] == [1, 2]
    assert torch.allclose(fast[0][0], called[0][0], atol=1e-5)
    assert torch.allclose(fast[1][0][~PADDING], called[1][0][~PADDING], atol=1e-5)


def test_only_what_is_around_the_path_is_changed():
    model = encoder()
    leave_fast_paths(model, "1.layers.0.linear1")
    assert [layer.activation_relu_or_gelu for layer in model[1].layers] == [0, 1]
    assert model[1].use_nested_tensor is False
    leave_fast_paths(model, "2")
    assert model[1].layers[1].activation_relu_or_gelu == 1


def test_a_compiled_encoder_rounds_activations_as_the_eager_one():
    model = encoder()
    qcompile.quantize(model, "int8", [X], progress=False)
    with torch.no_grad():
        expected = model(X)
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(X)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_loaded_encoder_calls_them_too(tmp_path):
    model = encoder()
    untouched = copy.deepcopy(model)
    qcompile.quantize(model, "int8", [X], progress=False)
    qcompile.save(model, tmp_path / "saved")
    loaded = qcompile.load(tmp_path / "saved", untouched)
    assert not any(layer.activation_relu_or_gelu for layer in loaded[1].layers) and not loaded[1].use_nested_tensor
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("with_batches", [True, False])
def test_four_bit_training_takes_the_linears_that_are_called(with_batches):
    model = encoder().train()
    data = {"batches": [X]} if with_batches else {"example": X}
    report = qcompile.train(model, "int4-train", progress=False, **data)
    linears = [f"1.layers.{layer}.linear{number}.weight" for layer in (0, 1) for number in (1, 2)]
    assert report.passes[0].done == linears
    reasons = {site.name: site.reason for site in report.sites if site.reason}
    assert "multiplies by it itself" in reasons["1.layers.0.self_attn.out_proj.weight"]
    assert "holds modules of its own" in reasons["1.layers.1.self_attn.in_proj_weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(X) - X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    with_gradients = model(X)
    with torch.no_grad():
        expected = model(X)
    assert torch.allclose(with_gradients, expected, atol=1e-2)  # the attention has a fast path of its own
    qcompile.settle(model)
    with torch.no_grad():
        assert torch.equal(model(X), expected)
