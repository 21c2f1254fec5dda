"""A packaged module takes and gives what the module does, and refuses what its graph was not compiled for."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

import qcompile
from qcompile.api.packaged_module import NamedOutputs, PackagedModule, describe_call
from qcompile.ir.call_tree import CallTree


class Pair(nn.Module):
    """Two inputs of one batch size, one setting, and outputs of a kind."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 3)

    def forward(self, x, mask, double=False):
        y = self.linear(x) * mask.unsqueeze(-1) * (2 if double else 1)
        return {"tensor": y, "tuple": (y, x + 1), "names": OrderedDict(y=y, more=[x + 1])}[self.kind]


def packaged(kind, **settings):
    """A module and what stands for it, whose graph runs as it was captured and whose description went through JSON."""
    model = Pair(kind).eval()
    call = CallTree.of((torch.randn(2, 4), torch.ones(2)), settings, model)
    program = qcompile.capture(model, call.args, call.kwargs)
    description = json.loads(json.dumps(describe_call(model, call, program, model(*call.args, **call.kwargs))))
    return model, PackagedModule(lambda inputs: list(program(*inputs)), description)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "names"])
def test_outputs_have_the_form_of_the_modules(kind):
    model, module = packaged(kind)
    for rows in (1, 2, 7):
        x, mask = torch.randn(rows, 4), torch.ones(rows)
        want, got, named = model(x, mask), module(x, mask), module(mask=mask, x=x)
        if kind == "tensor":
            assert torch.allclose(got, want) and torch.equal(got, named) and not got.requires_grad
        elif kind == "tuple":
            assert isinstance(got, tuple) and all(map(torch.allclose, got, want))
        else:
            assert isinstance(got, NamedOutputs) and list(got) == ["y", "more[0]"] and got.y is got["y"]
            assert torch.allclose(got.y, want["y"]) and torch.allclose(got["more[0]"], want["more"][0])
            with pytest.raises(AttributeError, match="no output 'z'; there are y"):
                _ = got.z


def test_a_setting_of_the_example_is_part_of_the_graph():
    model, module = packaged("tensor", double=True)
    x, mask = torch.randn(3, 4), torch.ones(3)
    assert torch.allclose(module(x, mask, double=True), model(x, mask, double=True))
    assert torch.allclose(module(x, mask), model(x, mask, double=True))
    with pytest.raises(ValueError, match=r"double=False is not what the package was made with \(True\)"):
        module(x, mask, double=False)


def test_strides_do_not_matter():
    model, module = packaged("tensor")
    seen = []
    module._graph = lambda inputs: seen.extend(inputs) or [inputs[0]]
    module(torch.randn(4, 5).t(), torch.ones(10)[::2])
    assert all(tensor.is_contiguous() for tensor in seen)


@pytest.mark.parametrize(
    "args,kwargs,words",
    [
        ((torch.ones(2, 4),), {}, "takes x, mask, got x"),
        ((torch.ones(2, 5), torch.ones(2)), {}, r"x is .*, and the package takes float32 \[.*, 4\]"),
        ((torch.ones(2, 4), torch.ones(3)), {}, r"mask is .* takes float32 \[2\]"),
        ((torch.ones(2, 4).double(), torch.ones(2)), {}, "x is float64"),
        ((torch.ones(2, 2, 4), torch.ones(2)), {}, "x is float32"),
        ((torch.ones(2, 4), torch.ones(2)), {"speed": 3}, r"speed=3 is not what .* \(nothing\)"),
    ],
)
def test_what_the_graph_was_not_compiled_for(args, kwargs, words):
    _, module = packaged("tensor")
    with pytest.raises(ValueError, match=words):
        module(*args, **kwargs)
