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


@pytest.mark.parametrize(
    "change", [dict(square=lambda x: x.pow(3)), dict(dim=0), dict(square=torch.abs), dict(square=lambda x: x * x.abs())]
)
def test_other_arithmetic_is_no_norm(change):
    assert not find_norms(capture(Decomposed(**change), (torch.randn(8, 8),), dynamic=False))


def test_the_last_dimension_by_its_number():
    _, norm = norm_of(Decomposed(dim=1), torch.randn(3, 8))
    assert norm.kind == "rms"


NO_NORMS = {
    "another value is divided": lambda x, eps: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "the root is added": lambda x, eps: x + torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "the mean has no dimension": lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5),
    "a maximum": lambda x, eps: x * torch.rsqrt(x.pow(2).amax(-1, keepdim=True) + 1e-5),
    "a computed epsilon": lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps),
    "no epsilon": lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "a product": lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) * 2.0),
    "of an input": lambda x, eps: torch.rsqrt(eps.abs()) * x,
    "integers": lambda x, eps: x.long() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "a computed gain": lambda x, eps: nn.functional.layer_norm(x, (8,), x[0] * 2),
    "a computed shift": lambda x, eps: nn.functional.layer_norm(x, (8,), None, x[0] * 2),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_no_norm(name):
    class Model(nn.Module):
        def forward(self, x, eps):
            return NO_NORMS[name](x, eps)

    assert not find_norms(capture(Model(), (torch.randn(8, 8), torch.rand(8, 1)), dynamic=False))


GAINS_THAT_ARE_NONE = {
    "two more": lambda m, y: y * (2 + m.weight),
    "one more, twice": lambda m, y: y * (1 + (1 + m.weight)),
    "one more than twice the weight": lambda m, y: y * torch.add(torch.ones(()), m.weight, alpha=2),
    "the weight and two ones": lambda m, y: y * torch.add(m.weight, 1, alpha=2),
    "a computed one": lambda m, y: y * m.weight.exp(),
    "itself": lambda m, y: y * y,
    "a sum": lambda m, y: y + m.weight,
    "one for all channels": lambda m, y: y * m.one,
    "one that broadcasts": lambda m, y: y * m.single,
    "one for each row": lambda m, y: y * m.matrix,
    "with another reader of the normalized value": lambda m, y: (y * m.weight, y.sin()),
    "as floats that another norm reads": lambda m, y: (lambda w: (y * w, w.sin()))(m.weight.double()),
}


@pytest.mark.parametrize("name", GAINS_THAT_ARE_NONE)
def test_factors_that_are_no_gain(name):
    class Model(Decomposed):
        def __init__(self):
            super().__init__()
            self.one, self.single = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([2.0]))
            self.matrix = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return GAINS_THAT_ARE_NONE[name](self, y)

    _, norm = norm_of(Model(), torch.randn(8, 8))
    assert norm.gain is None and norm.output.target is torch.ops.aten.mul.Tensor
    assert norm.output.args[0] is norm.input


def test_a_gain_is_found_on_either_side_and_behind_casts():
    for gain in (lambda y, w: w * y, lambda y, w: y.double() * w.double(), lambda y, w: y * torch.add(1, w)):

        class Model(Decomposed):
            def forward(self, x, gain=gain):
                return gain(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * x, self.weight).double().float()

        program, norm = norm_of(Model(), torch.randn(3, 8))
        assert norm.output is program.outputs[0] and program.weight_name(norm.gain) == "weight"


def test_a_cast_that_the_residual_reads_is_the_input():
    class Model(Decomposed):
        def forward(self, x):
            wide = x.float()
            return wide + super().forward(wide)

    program, norm = norm_of(Model(), torch.randn(3, 8).bfloat16())
    assert norm.input is not program.inputs[0] and norm.input.args[0] is program.inputs[0]
    assert norm.input not in norm.inner


@pytest.mark.parametrize(
    "module,kind,eps",
    [(nn.LayerNorm(8), "layer", 1e-5), (nn.LayerNorm(8, eps=1e-3), "layer", 1e-3),
     (nn.RMSNorm(8, eps=1e-6), "rms", 1e-6), (nn.RMSNorm(8), "rms", torch.finfo(torch.float32).eps),
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
