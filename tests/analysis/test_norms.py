"""Norms are found by their arithmetic: kinds, gains, casts, and what is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.analysis.norms import find_norms
from qcompile.ir.capture import capture


class Decomposed(nn.Module):
    """x / sqrt(mean x^2 + eps) * g, with the casts and the gain that are given."""

    def __init__(self, up=lambda x: x, down=lambda x, to: x, gain=lambda w: w, square=lambda x: x.pow(2), dim=-1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.up, self.down, self.gain, self.square, self.dim = up, down, gain, square, dim

    def forward(self, x):
        wide = self.up(x)
        wide = wide * torch.rsqrt(self.square(wide).mean(self.dim, keepdim=True) + 1e-5)
        return self.down(wide, x) * self.gain(self.weight)


def norm_of(model, x):
    program = capture(model, (x,))
    (norm,) = find_norms(program)
    return program, norm


@pytest.mark.parametrize(
    "up,down",
    [
        (lambda x: x, lambda y, x: y),
        (lambda x: x.float(), lambda y, x: y.to(x.dtype)),
        (lambda x: x.to(torch.float32), lambda y, x: y.type_as(x)),
        (lambda x: x.to(x.device, torch.float32), lambda y, x: y.to(x.device, x.dtype)),
        (lambda x: x.float(), lambda y, x: y.to(x)),
    ],
)
@pytest.mark.parametrize("gain,one_plus", [(lambda w: w, False), (lambda w: 1 + w, True), (lambda w: w.float(), False)])
def test_rms_norms_of_low_precision(up, down, gain, one_plus):
    x = torch.randn(3, 8).bfloat16()
    program, norm = norm_of(Decomposed(up, down, gain).bfloat16(), x)
    assert (norm.kind, norm.one_plus, norm.eps) == ("rms", one_plus, 1e-5)
    assert norm.input is program.inputs[0] and program.weight_name(norm.gain) == "weight"
    assert norm.output is program.outputs[0]


def test_the_square_as_a_product():
    _, norm = norm_of(Decomposed(square=lambda x: x * x), torch.randn(3, 8))
    assert norm.kind == "rms"


@pytest.mark.parametrize("change", [dict(square=lambda x: x.pow(3)), dict(dim=0), dict(square=torch.abs)])
def test_other_arithmetic_is_no_norm(change):
    assert not find_norms(capture(Decomposed(**change), (torch.randn(8, 8),), dynamic=False))


@pytest.mark.parametrize(
    "module,kind,eps",
    [(nn.LayerNorm(8), "layer", 1e-5), (nn.RMSNorm(8, eps=1e-6), "rms", 1e-6),
     (nn.RMSNorm(8), "rms", torch.finfo(torch.float32).eps),
     (nn.LayerNorm(8, elementwise_affine=False), "layer", 1e-5)],
)  # fmt: skip
def test_norms_in_one_operator(module, kind, eps):
    program, norm = norm_of(module, torch.randn(3, 8))
    assert (norm.kind, norm.eps) == (kind, eps)
    assert (program.weight_name(norm.gain) is not None) == (module.weight is not None)


def test_only_norms_of_the_last_dimension_are_norms():
    assert not find_norms(capture(nn.LayerNorm((4, 8)), (torch.randn(3, 4, 8),)))


@pytest.mark.parametrize("gain", [lambda w: w, lambda w: 1 + w])
def test_a_gain_is_read_and_written_as_it_is_multiplied(gain):
    model, x = Decomposed(gain=gain), torch.randn(3, 8)
    program, norm = norm_of(model, x)
    assert torch.allclose(norm.gain_value(program), gain(model.weight).double()) and not norm.has_unit_gain(program)
    norm.set_gain(program, torch.ones(8, dtype=torch.float64))
    assert norm.has_unit_gain(program) and program.weights["weight"].dtype == torch.float32
    assert torch.allclose(program(x)[0].pow(2).mean(-1), torch.ones(3), atol=1e-3)


def test_a_norm_without_a_gain():
    program, norm = norm_of(nn.RMSNorm(8, elementwise_affine=False), torch.randn(3, 8))
    assert norm.has_unit_gain(program) and bool((norm.gain_value(program) == 1).all())
    with pytest.raises(ValueError, match="has no gain to set"):
        norm.set_gain(program, torch.ones(8))


def test_a_bias_is_no_unit_gain():
    module = nn.LayerNorm(8)
    program, norm = norm_of(module, torch.randn(3, 8))
    assert norm.has_unit_gain(program)
    with torch.no_grad():
        module.bias[3] = 0.5
    assert not norm.has_unit_gain(program)
