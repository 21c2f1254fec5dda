"""One form for one meaning, and the same values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.ir.capture import capture

aten = torch.ops.aten


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


class Scores(nn.Module):
    """Scores with a bias, in one operator."""

    def __init__(self, beta, alpha):
        super().__init__()
        self.factors = dict(beta=beta, alpha=alpha)

    def forward(self, bias, a, b):
        return torch.baddbmm(bias, a, b, **self.factors)


@pytest.mark.parametrize("beta,alpha", [(1, 1), (0.5, 1), (1, -3.0), (2.0, 0.25), (0, 2.0)])
def test_a_product_and_a_sum_in_one_operator(beta, alpha):
    model = Scores(beta, alpha)
    inputs = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    program = capture(model, inputs)
    assert aten.bmm.default in targets(program) and aten.baddbmm.default not in targets(program)
    assert torch.allclose(program(*inputs)[0], model(*inputs), atol=1e-6)
    if beta == 0:  # whatever the bias holds
        assert torch.allclose(program(torch.full((2, 3, 5), torch.nan), *inputs[1:])[0], model(*inputs), atol=1e-6)


BETWEEN = {  # a `contiguous` that copies, and a `view` behind it that is legal for the copy only
    "nothing": lambda y, x: y,
    "dropout": lambda y, x: torch.dropout(y, 0.1, False),
    "detach": lambda y, x: y.detach(),
    "a cast that is none": lambda y, x: y.to(x.dtype),
    "a function": lambda y, x: torch.relu(y),
    "a function in place": lambda y, x: y.relu_(),
    "a sum": lambda y, x: y + 1,
    "a product with itself": lambda y, x: y * y.sigmoid(),
    "a view": lambda y, x: y.view(2, 2, -1).view(2, 2, 4, 8),
    "a slice": lambda y, x: y[:1],
    "a residual": lambda y, x: y + x.view(2, 4, 2, 8).transpose(1, 2),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_view_behind_a_copy(name):
    class Transposed(torch.nn.Module):
        def forward(self, x):
            y = x.view(2, 4, 2, 8).transpose(1, 2).contiguous()
            y = BETWEEN[name](y, x)
            return y, y.reshape(-1, 4, 16) if name == "a residual" else y.view(-1, 4, 16)

    x = torch.randn(2, 4, 16)
    program = capture(Transposed(), (x,), dynamic=False)
    for got, want in zip(program(x), Transposed()(x), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()  # a later graph may take a view of it


def test_a_copy_whose_original_is_written_to_stays():
    class Written(torch.nn.Module):
        def forward(self, x):
            y = x * 2
            copy = y.to(torch.float32, copy=True)
            y[:, 0] = 7.0
            return copy + 0, y

    x = torch.randn(2, 4)
    for got, want in zip(capture(Written(), (x,))(x), Written()(x), strict=True):
        assert torch.equal(got, want)


# -- products and weights ----------------------------------------------------------------------------


class Product(nn.Module):
    """x times a matrix that is stored [K, N] or [N, K]."""

    def __init__(self, function, shape=(8, 6)):
        super().__init__()
        self.weight, self.bias, self.function = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(6)), function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


STORED_K_N = {
    "matmul": lambda x, w, b: x @ w,
    "mm": lambda x, w, b: torch.mm(x, w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
}
STORED_N_K = {
    "t": lambda x, w, b: x @ w.t(),
    "T": lambda x, w, b: x @ w.T,
    "mT": lambda x, w, b: x @ w.mT,
    "transpose": lambda x, w, b: x @ w.transpose(0, 1),
    "transpose of negative axes": lambda x, w, b: x @ w.transpose(-1, -2),
    "permute": lambda x, w, b: x @ w.permute(1, 0),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
}


@pytest.mark.parametrize("name", STORED_K_N)
def test_products_with_a_transposed_weight(name):
    model, x = Product(STORED_K_N[name]), torch.randn(3, 8)
    program = capture(model, (x,))
    assert targets(program) == [aten.linear.default] and program.transposed == {"weight"}
    assert program.weights["weight"].shape == (6, 8)
    assert torch.allclose(program(x)[0], model(x), atol=1e-5)


@pytest.mark.parametrize("name", STORED_N_K)
def test_products_with_a_weight_as_linears_store_it(name):
    model, x = Product(STORED_N_K[name], (6, 8)), torch.randn(3, 8)
    program = capture(model, (x,))
    assert targets(program) == [aten.linear.default] and not program.transposed
    assert torch.allclose(program(x)[0], model(x), atol=1e-5)


@pytest.mark.parametrize("permute", [lambda w: w.permute(0, 1), lambda w: w.transpose(1, 1)])
def test_a_transpose_that_swaps_nothing(permute):
    model, x = Product(lambda x, w, b: x @ permute(w), (8, 8)), torch.randn(3, 8)
    program = capture(model, (x,))
    assert torch.allclose(program(x)[0], model(x), atol=1e-5)


def test_a_weight_with_another_consumer_stays_as_it_is_stored():
    model, x = Product(lambda x, w, b: (x @ w) @ w.t()), torch.randn(3, 8)
    program = capture(model, (x,))
    assert not program.transposed and torch.allclose(program(x)[0], model(x), atol=1e-4)


def test_tied_weights_have_one_placeholder():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.other(self.second(self.first(x)))

    program = capture(Tied(), (torch.randn(3, 8),))
    assert program.aliases == {"first.weight": ["second.weight"]}
    assert "second.weight" not in program.weights and len(program.node_of("first.weight").users) == 2


@pytest.mark.parametrize(
    "function,left",
    [
        (lambda x: x.detach().to(x.dtype).contiguous()[:], []),
        (lambda x: torch.dropout(x, 0.3, False), []),
        (lambda x: x[:, :][..., 0:], []),
        (lambda x: x.double(), [aten.to.dtype]),
        (lambda x: x[1:], [aten.slice.Tensor]),
        (lambda x: x[::2], [aten.slice.Tensor]),
    ],
)
def test_no_ops_go_and_others_stay(function, left):
    class Neg(nn.Module):
        def forward(self, x):
            return torch.neg(function(x))

    x = torch.randn(4, 6)
    program = capture(Neg(), (x,))
    assert targets(program) == [*left, aten.neg.default]
    assert torch.equal(program(x)[0], -function(x))


def test_a_scope_without_gradients_is_spliced_in():
    class Scoped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                y, z = self.linear(x), x * 2
            return torch.relu(y) + z

    x = torch.randn(3, 8)
    with torch.enable_grad():
        program = capture(Scoped(), (x,))
    assert aten.linear.default in targets(program)
    assert torch.allclose(program(x)[0], Scoped.forward(_with(program), x), atol=1e-6)


def _with(program):
    """The module again, with the program's weights."""
    linear = nn.Linear(8, 8)
    linear.load_state_dict({"weight": program.weights["linear.weight"], "bias": program.weights["linear.bias"]})
    return type("Module", (), {"linear": linear})()


class ComputedBias(nn.Module):
    """A linear whose bias is a part of a parameter."""

    def __init__(self):
        super().__init__()
        self.weight, self.biases = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(12))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.biases[3:9])


def test_a_computed_bias_is_a_sum_behind_the_product():
    model, x = ComputedBias(), torch.randn(3, 8)
    program = capture(model, (x,))
    (linear,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert len(linear.args) == 2
    assert torch.allclose(program(x)[0], model(x), atol=1e-6)


def same(model, x, **options):
    program = capture(model.eval(), (x,), **options)
    with torch.no_grad():
        want = model(x)
    for got, expected in zip(program(x), want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    return program


class Parts(nn.Module):
    """Parameters that are parts of one memory: neither offset, nor shape, nor strides alone tell them apart."""

    def __init__(self):
        super().__init__()
        memory = torch.randn(100)
        self.all, self.next = nn.Parameter(memory[:64].view(8, 8)), nn.Parameter(memory[32:96].view(8, 8))
        self.transposed, self.rows = nn.Parameter(memory[:64].view(8, 8).t()), nn.Parameter(memory[:48].view(6, 8))

    def forward(self, x):
        linear = nn.functional.linear
        return linear(x, self.all), linear(x, self.next), linear(x, self.transposed), linear(x, self.rows)


def test_parts_of_one_memory_are_not_tied():
    assert not same(Parts(), torch.randn(3, 8)).aliases


class Function(nn.Module):
    def __init__(self, function, shape=(8, 6)):
        super().__init__()
        self.weight, self.bias, self.function = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(6)), function

    def forward(self, x):
        return self.function(self, x)


def test_a_dropout_in_training_stays():
    program = capture(Function(lambda m, x: torch.dropout(x, 0.5, True)), (torch.randn(3, 8),))
    assert targets(program) == [aten.dropout.default]


def test_a_copy_that_nothing_writes_to_goes():
    program = same(Function(lambda m, x: torch.relu(x.to(torch.float32, copy=True))), torch.randn(3, 8))
    assert targets(program) == [aten.relu.default]


def test_slices_that_drop_something_stay():
    program = same(Function(lambda m, x: (x[:-1] * 1.5, x[:3] * 2.5, x[:4] * 3.5)), torch.randn(5, 8), dynamic=False)
    assert targets(program).count(aten.slice.Tensor) == 3


@pytest.mark.parametrize("beta,alpha", [(0.5, 1), (1, 2.0)])
def test_factors_of_a_product_with_a_weight_stay(beta, alpha):
    same(Function(lambda m, x: torch.addmm(m.bias, x, m.weight, beta=beta, alpha=alpha)), torch.randn(3, 8))


STAY = {
    "a stack": (lambda m, x: x @ m.weight, (2, 8, 6)),
    "a transposed stack": (lambda m, x: x @ m.weight.mT, (2, 6, 8)),
    "a stack whose first axes are transposed": (lambda m, x: x @ m.weight.transpose(0, 1), (8, 2, 6)),
    "a vector": (lambda m, x: x @ m.weight, (8,)),
    "a computed weight": (lambda m, x: x @ m.weight.exp(), (8, 6)),
    "what reads it as it is": (lambda m, x: (x @ m.weight) @ m.weight.t(), (8, 6)),
}


@pytest.mark.parametrize("name", STAY)
def test_products_with_stacks_and_vectors_stay(name):
    function, shape = STAY[name]
    x = torch.randn(2, 3, 8)
    program = same(Function(function, shape), x, dynamic=False)
    assert not program.transposed and (aten.linear.default in targets(program)) == (name == "what reads it as it is")


def test_a_weight_under_two_names_stays_as_it_is_stored():
    """The other name is not read, but is a parameter all the same."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(8, 6)), nn.Linear(6, 8, bias=False)
            self.second.weight = self.first

        def forward(self, x):
            return x @ self.first

    program = same(Two(), torch.randn(3, 8), dynamic=False)
    assert not program.transposed


def test_a_transpose_by_axes_from_both_ends():
    same(Function(lambda m, x: x @ m.weight.transpose(-1, 1), (8, 8)), torch.randn(3, 8))


def test_a_stored_bias_stays_with_its_product():
    program = same(nn.Linear(8, 6), torch.randn(3, 8))
    assert targets(program) == [aten.linear.default] and len(program.outputs[0].args) == 3


def test_both_results_of_a_scope_without_gradients():
    class Scoped(nn.Module):
        def forward(self, x):
            with torch.set_grad_enabled(not torch.is_grad_enabled()):
                y, z = x * 2, x + 3
            return y - z * x

    x = torch.randn(3, 8)
    program = capture(Scoped(), (x,))
    assert targets(program) == [aten.mul.Tensor, aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]
    assert torch.allclose(program(x)[0], Scoped()(x))
