"""Sites are found by arithmetic: linears, stacks of experts, grouped products under any name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import build, example

from qcompile.analysis.sites import find_sites, grouped_operands, is_grouped_matmul, through_transposes
from qcompile.ir.capture import capture
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe

E, K, N = 4, 8, 6


@torch.library.custom_op("qcompile_test::routed_rows", mutates_args=())
def routed_rows(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """A library's own grouped product: x [T, K], stack [E, K, N], ends [E] -> [T, N]."""
    pieces = x.tensor_split(ends[:-1].cpu().long())
    return torch.cat([piece @ matrix for piece, matrix in zip(pieces, stack, strict=True)])


@routed_rows.register_fake
def _(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], stack.shape[2])


@torch.library.custom_op("qcompile_test::grouped_mm_of_thirds", mutates_args=())
def grouped_mm_of_thirds(x: Tensor, stack: Tensor, third: Tensor) -> Tensor:
    """Not grouped, whatever its name says: the third operand is a bias [E]."""
    return (x @ stack[0]) + third[0]


@grouped_mm_of_thirds.register_fake
def _(x: Tensor, stack: Tensor, third: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], stack.shape[2])


class Experts(nn.Module):
    def __init__(self, product, shape=(E, K, N), third=torch.int32):
        super().__init__()
        self.stack, self.product = nn.Parameter(torch.randn(shape)), product
        self.register_buffer("third", torch.tensor([2, 2, 4, 5], dtype=third))

    def forward(self, x):
        return self.product(x, self.stack, self.third)


def captured(product, x=None, **config):
    return capture(Experts(product, **config), (torch.randn(5, K) if x is None else x,), dynamic=False)


def test_a_grouped_product_by_its_operands():
    program = captured(lambda x, w, e: torch.ops.qcompile_test.routed_rows(x, w, e))
    (site,) = find_sites(program)
    assert (site.kind, site.grouped, site.rows_first, site.N, site.K) == ("experts", True, False, N, K)
    assert grouped_operands(site.node) == (program.inputs[0], program.node_of("stack"), program.node_of("third"))


def test_stored_as_rows_and_transposed():
    program = captured(lambda x, w, e: torch.ops.qcompile_test.routed_rows(x, w.transpose(1, 2), e), shape=(E, N, K))
    (site,) = find_sites(program)
    assert site.grouped and site.rows_first and (site.N, site.K) == (N, K) and site.name == "stack"
    assert not site.shared_with


def test_a_name_makes_no_grouped_product():
    program = captured(lambda x, w, e: torch.ops.qcompile_test.grouped_mm_of_thirds(x, w, e), third=torch.float32)
    assert not find_sites(program)
    assert not any(is_grouped_matmul(node) for node in program.graph.nodes)


@pytest.mark.parametrize("change", ["entries", "K", "dtype"])
def test_operands_that_do_not_fit(change):
    @torch.library.custom_op(f"qcompile_test::unfit_{change}", mutates_args=())
    def unfit(x: Tensor, stack: Tensor, third: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], stack.shape[2])

    unfit.register_fake(lambda x, stack, third: x.new_empty(x.shape[0], stack.shape[2]))
    shape = {"entries": (E + 1, K, N), "K": (E, K + 1, N), "dtype": (E, K, N)}[change]
    program = captured(unfit, shape=shape, third=torch.float32 if change == "dtype" else torch.int32)
    assert not find_sites(program) and not any(is_grouped_matmul(node) for node in program.graph.nodes)


def test_a_batched_product():
    program = captured(lambda x, w, e: torch.bmm(x, w), torch.randn(E, 3, K))
    (site,) = find_sites(program)
    assert site.batched and not site.grouped and (site.N, site.K) == (N, K)


def test_a_stack_on_the_left_is_no_site():
    assert not find_sites(captured(lambda x, w, e: torch.bmm(w, x), torch.randn(E, N, 3)))
    assert not find_sites(captured(lambda x, w, e: torch.bmm(w, x), torch.randn(E, K, 3), shape=(E, K, K)))


@pytest.mark.parametrize(
    "transpose,count",
    [(lambda w: w.transpose(-1, -2), 1), (lambda w: w.permute(0, 2, 1), 1), (lambda w: w.mT, 1),
     (lambda w: w.mT.transpose(2, 1), 2),
     (lambda w: w.permute(1, 0, 2), 0), (lambda w: w.transpose(0, 1), 0)],
)  # fmt: skip
def test_transposes_of_the_last_two_axes(transpose, count):
    program = captured(lambda x, w, e: x @ transpose(w), torch.randn(4, 3, 4), shape=(4, 4, 4))
    product = next(n for n in program.graph.nodes if n.target is torch.ops.aten.matmul.default)
    source, found = through_transposes(product.args[1])
    assert found == count and (program.weight_name(source) == "stack") == (count > 0)


def test_siblings_and_shared_weights():
    program = capture(build("llama"), (), example("llama"))
    sites = {site.name.split(".", 2)[-1]: site for site in find_sites(program)}
    assert len(sites["0.self_attn.q_proj.weight"].siblings) == 2
    table = next(site for site in sites.values() if site.shared_with)
    assert "embedding" in table.shared_with[0] and not table.siblings


def test_a_table_straight_in_front_of_its_tied_product_is_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 8)

        def forward(self, ids):
            return nn.functional.linear(self.table(ids), self.table.weight)

    (site,) = find_sites(capture(Tied(), (torch.randint(0, 16, (2, 3)),)))
    assert site.shared_with == ("embedding",)


class SquareStack(nn.Module):
    """A stack of square matrices, read as it is stored, [E, K, N], or transposed."""

    def __init__(self, transposed):
        super().__init__()
        self.stack, self.transposed = nn.Parameter(torch.randn(E, K, K)), transposed

    def forward(self, x):
        return x @ (self.stack.transpose(1, 2) if self.transposed else self.stack)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_layout_of_a_square_stack_is_that_of_its_product(transposed):
    model, x = SquareStack(transposed).requires_grad_(False), torch.randn(E, 5, K)
    program = capture(model, (x,), dynamic=False)
    (site,) = find_sites(program)
    assert site.rows_first is transposed
    quantized, _ = run(program, Recipe("w8", (Quantize("int8", None, None), Fuse())))
    assert (quantized(x)[0] - model(x)).norm() < 0.02 * model(x).norm()


def test_one_row_of_values_for_all_experts_is_not_batched():
    for x, batched in ((torch.randn(E, 3, K), True), (torch.randn(1, 3, K), False), (torch.randn(E, E, 3, K), False)):
        (site,) = find_sites(captured(lambda x, w, e: x @ w, x))
        assert site.batched == batched and not site.grouped


def test_siblings_share_an_input():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)

        def forward(self, x):
            return self.c(self.a(x)), self.b(x)

    sites = {site.name[0]: site for site in find_sites(capture(Siblings(), (torch.randn(3, K),)))}
    assert {name: site.siblings for name, site in sites.items()} == {
        "a": ("b.weight",), "b": ("a.weight",), "c": (),
    }  # fmt: skip
    assert (sites["a"].N, sites["a"].K, sites["c"].N, sites["c"].K) == (N, K, K, N)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, e: nn.functional.linear(x, w[0] * 2),
        lambda x, w, e: nn.functional.linear(x, x),
        lambda x, w, e: x @ x.t(),
        lambda x, w, e: (w[0] @ x[0]).sin(),
        lambda x, w, e: nn.functional.layer_norm(x, (K,), w[0, 0]),
        lambda x, w, e: x.expand(2, 5, K) @ e[: 2 * K].view(K, 2),
    ],
)
def test_what_has_no_weight_of_its_own_is_no_site(function):
    model = Experts(function, shape=(E, N, K))
    model.third = torch.randn(2 * K)
    assert not find_sites(capture(model, (torch.randn(5, K),), dynamic=False))


def test_a_matrix_on_the_right_of_a_batch_is_no_stack():
    class Matrix(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.other = nn.Parameter(torch.randn(K, N)), nn.Parameter(torch.randn(N, K))

        def forward(self, x):
            return torch.matmul(x, self.matrix), self.matrix * 2

    assert not find_sites(capture(Matrix(), (torch.randn(2, 3, K),), dynamic=False))


def test_a_stack_that_is_transposed_twice():
    (site,) = find_sites(captured(lambda x, w, e: x @ w.mT.transpose(2, 1), torch.randn(E, 3, K)))
    assert not site.rows_first and (site.N, site.K) == (N, K)


def test_a_product_of_rows_that_reads_something_else_too():
    @torch.library.custom_op("qcompile_test::shifted", mutates_args=())
    def shifted(x: Tensor, stack: Tensor, ends: Tensor, shift: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], stack.shape[2])

    shifted.register_fake(lambda x, stack, ends, shift: x.new_empty(x.shape[0], stack.shape[2]))
    assert not find_sites(captured(lambda x, w, e: shifted(x, w, e, x[0])))


OPERANDS = {  # x, the shape that comes out
    "rows of rows": (torch.randn(5, 2, K), lambda x, w: (5, N)),
    "a result of rows of rows": (torch.randn(5, K), lambda x, w: (5, N, 1)),
    "other rows": (torch.randn(5, K), lambda x, w: (6, N)),
    "other columns": (torch.randn(5, K), lambda x, w: (5, N + 1)),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_and_results_of_other_shapes(name):
    x, shape = OPERANDS[name]

    @torch.library.custom_op(f"qcompile_test::shapes_{name.replace(' ', '_')}", mutates_args=())
    def other(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
        return x.new_zeros(shape(x, stack))

    other.register_fake(lambda x, stack, ends: x.new_empty(shape(x, stack)))
    program = captured(other, x)
    assert not find_sites(program) and not any(is_grouped_matmul(node) for node in program.graph.nodes)
