"""Operators in place become functional where nothing else reads the memory, and stay right where something does."""

import pytest
import torch
import torch._dynamo
from torch import nn

import qcompile
from qcompile.ir.aten_ops import aten
from qcompile.ir.capture import capture
from qcompile.ir.in_place import is_off, memory_of, written_memory
from qcompile.ir.node_meta import WRITTEN


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def is_in_place(program):
    return any(getattr(getattr(t, "_schema", None), "is_mutable", False) for t in targets(program))


class InPlace(nn.Module):
    """A linear's output, which a function changes in place."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function
        self.table = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return self.function(self.linear(x), x + 1, self.table)


def _add(y, z):
    y += z
    return y


OWNED = {
    "the output of a linear": lambda y, z, t: _add(y, z),
    "a reshape": lambda y, z, t: _add(y.reshape(-1, 8), z.flatten(0, 1)),
    "a view": lambda y, z, t: _add(y.view(-1, 8), z.flatten(0, 1)),
    "a transpose": lambda y, z, t: _add(y.transpose(0, 1), z.transpose(0, 1)),
    "a sum of sums": lambda y, z, t: _add(_add(y, z), z),
    "whose sizes are read": lambda y, z, t: _add(y, z * y.shape[0]),
    "a copy": lambda y, z, t: (_add(y.transpose(0, 1).contiguous(), z.transpose(0, 1)), y),
    "a clone": lambda y, z, t: (_add(y.clone(), z), y),
    "a part of a split": lambda y, z, t: (lambda a, b: (_add(a, z[..., :4]), b))(*y.split(4, -1)),
    "what was read before": lambda y, z, t: (torch.relu(y), _add(y, z)),
    "in evaluation, a dropout": lambda y, z, t: _add(torch.dropout(y, 0.1, False), z),
}
SHARED = {
    "a view of what is read again": lambda y, z, t: (_add(y.view(-1, 8), z.flatten(0, 1)), y),
    "a row": lambda y, z, t: (_add(y[:, 0], z[:, 0]), y),
    "a row of which nothing is returned": lambda y, z, t: [_add(y[:, 0], z[:, 0]), y][1],
    "a slice of a transpose": lambda y, z, t: (_add(y.transpose(0, 1)[1:], z.transpose(0, 1)[1:]), y),
    "a view that was taken before": lambda y, z, t: (lambda v: (_add(y, z), v * 2))(y.view(-1, 8)),
    "a reshape that is a view": lambda y, z, t: (_add(y.reshape(-1, 8), z.flatten(0, 1)), y),
    "in evaluation, the dropout of what is read": lambda y, z, t: (_add(torch.dropout(y, 0.1, False), z), y),
}


@pytest.mark.parametrize("name", OWNED)
def test_a_sum_in_place_of_memory_that_nothing_else_reads(name):
    model, x = InPlace(OWNED[name]), torch.randn(2, 4, 8)
    program = capture(model, (x,), dynamic=name == "whose sizes are read")
    assert aten.add_.Tensor not in targets(program)
    with torch.no_grad():
        want = model(x)
    for got, expected in zip(program(x), want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", SHARED)
def test_a_sum_in_place_of_memory_that_is_read_elsewhere(name):
    model, x = InPlace(SHARED[name]), torch.randn(2, 4, 8)
    program = capture(model, (x,), dynamic=False)
    assert aten.add_.Tensor in targets(program)
    with torch.no_grad():
        want = model(x)
    for got, expected in zip(program(x), want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(got, expected)


def test_inputs_are_changed_in_place_as_the_model_does():
    class Counter(nn.Module):
        def forward(self, x):
            x.add_(1.0)
            return x * 2

    x = torch.zeros(2, 3)
    program = capture(Counter(), (x.clone(),))
    (got,) = program(x)
    assert torch.equal(x, torch.ones(2, 3)) and torch.equal(got, torch.full((2, 3), 2.0))


OPERATORS = {
    "relu_": lambda y, z: y.relu_(),
    "mul_ by a tensor": lambda y, z: y.mul_(z),
    "mul_ by a scalar": lambda y, z: y.mul_(0.5),
    "sub_ with alpha": lambda y, z: y.sub_(z, alpha=2),
    "clamp_": lambda y, z: y.clamp_(-0.5, 0.5),
    "masked_fill_": lambda y, z: y.masked_fill_(z > 1, 0.0),
    "index_put_": lambda y, z: y.index_put_((torch.tensor([0]),), torch.tensor(2.0)),
    "copy_": lambda y, z: y.copy_(z),
    "inplace activation": lambda y, z: torch.nn.functional.silu(y, inplace=True),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_in_place_become_functional_and_later_readers_read_the_result(name):
    def both(y, z, table):
        first = y.exp()  # of what y was
        OPERATORS[name](y, z)
        return first, y * 2  # of what it is now, by its old name

    model, x = InPlace(both), torch.randn(2, 4, 8)
    program = capture(model, (x,), dynamic=False)
    assert not is_in_place(program)
    with torch.no_grad():
        want = model(x)
    for got, expected in zip(program(x), want, strict=True):
        assert torch.equal(got, expected)


def test_a_sum_in_place_keeps_the_dtype_of_what_it_writes_to():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8, dtype=torch.bfloat16)

        def forward(self, x):
            y = self.linear(x)
            y += x.float() / 3
            return y

    model, x = Narrow(), torch.randn(2, 8, dtype=torch.bfloat16)
    program = capture(model, (x,))
    with torch.no_grad():
        want = model(x)
    (got,) = program(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


class WrittenLater(nn.Module):
    """A row of a linear's input is overwritten between two reads of its views."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = x * 2
        before = self.first(y)
        y[:, 0] = 100.0
        return before, self.second(y)


def test_an_activation_is_quantized_as_it_is_when_its_linear_reads_it():
    torch.manual_seed(0)
    model, x = WrittenLater().eval().requires_grad_(False), torch.randn(3, 4, 8)
    program = capture(model, (x,))
    assert any(node.meta.get(WRITTEN) for node in program.graph.nodes)
    want = model(x)
    qcompile.quantize(model, "int8", example=x, progress=False)
    for got, expected in zip(model(x), want, strict=True):
        assert (got - expected).norm() < 0.02 * expected.norm()
    torch._dynamo.reset()
    model = WrittenLater().eval().requires_grad_(False)
    want = model(x)
    compiled = torch.compile(model, backend="qcompile", options={"on_slow_kernel": "quantize"})
    for got, expected in zip(compiled(x), want, strict=True):
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_values_that_are_written_to_are_marked():
    program = capture(WrittenLater(), (torch.randn(3, 4, 8),))
    marked = {node.name for node in program.graph.nodes if node.meta.get(WRITTEN)}
    (product, *_), linears = (
        [n for n in program.graph.nodes if n.target is target] for target in (aten.mul.Tensor, aten.linear.default)
    )
    assert product.name in marked and len(linears) == 2 and not {n.name for n in linears} & marked


def test_only_what_is_written_counts_as_written():
    class Reads(nn.Module):
        def forward(self, x):
            y, z = x * 2, x + 3
            y[:, 0] += z[:, 0]
            return y, z * 2

    program = capture(Reads(), (torch.randn(3, 4),))
    (z,) = [node for node in program.graph.nodes if node.target is aten.add.Tensor and node.args[1] == 3]
    assert memory_of(z) not in written_memory(program) and written_memory(program)


def test_the_memory_of_a_list_is_that_of_its_parts():
    program = capture(InPlace(lambda y, z, t: y.split(4, -1)[1] * 2), (torch.randn(2, 4, 8),))
    split = next(node for node in program.graph.nodes if node.target is aten.split.Tensor)
    assert memory_of(split) == memory_of(split.args[0]) is not None


def test_a_dropout_in_training_is_not_off():
    program = capture(InPlace(lambda y, z, t: torch.dropout(y, 0.5, True)), (torch.randn(2, 4, 8),))
    (dropout,) = [node for node in program.graph.nodes if node.target is aten.dropout.default]
    assert not is_off(dropout)


def test_the_same_part_of_a_split_twice():
    def function(y, z, table):
        parts = y.split(4, -1)
        first, again = parts[0], parts[0][:, :]
        before = again * 1.0
        first.view(-1, 4)[0] = 7.0
        return before, y[..., 0] * 2

    model, x = InPlace(function), torch.randn(2, 4, 8)
    program = capture(model, (x,), dynamic=False)
    with torch.no_grad():
        want = model(x)
    for got, expected in zip(program(x), want, strict=True):
        assert torch.equal(got, expected)


def test_a_result_of_another_shape_stays_in_place():
    model, x = InPlace(lambda y, z, t: (y.unsqueeze_(0), y * 2)[1]), torch.randn(2, 4, 8)
    program = capture(model, (x,), dynamic=False)
    with torch.no_grad():
        want = model(x)
    assert program(x)[0].shape == want.shape and torch.equal(program(x)[0], want)
