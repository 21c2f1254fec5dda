"""What is a linear is read off the graph and the calls: nothing else may lie in the module's call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from qcompile.analysis.conv_sites import find_conv_sites
from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture, from_exported
from qcompile.ir.linear_modules import find_linear_modules, modules_with_hooks, recorded_calls
from qcompile.ir.node_meta import MODULE, NO_MODULE

K = 8


class Changed(nn.Linear):
    """A linear whose forward is `change(module, x, linear)`."""

    def __init__(self, change):
        super().__init__(K, K)
        self.change = change

    def forward(self, x):
        return self.change(self, x, super().forward)


def notes(model, x=None):
    """Site -> the module that it is, or the reason why it is none."""
    program = capture(model.eval(), (torch.randn(3, K) if x is None else x,))
    return {s.name: s.node.meta.get(MODULE, s.node.meta.get(NO_MODULE)) for s in find_sites(program)}


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda m, x, f: f(x) * 1.0001, "computes aten.mul.Tensor too"),
        (lambda m, x, f: f(x).clamp(-1e6, 1e6), "computes aten.clamp too"),
        (lambda m, x, f: torch.where(x > 1e6, 0.0, f(x)), "computes aten.gt.Scalar"),
        (lambda m, x, f: f(x.to(m.weight.dtype)), "computes aten.to.dtype too"),
        (lambda m, x, f: functional.dropout(f(x), 0.1, m.training), "computes aten.dropout too"),
        (lambda m, x, f: f(x).relu_(), "computes aten.relu_ too"),
        (lambda m, x, f: f(f(x)), "computes aten.linear too"),
        (lambda m, x, f: (f(x), x.zero_())[0], "computes aten.zero_ too"),
        (lambda m, x, f: functional.linear(x, m.weight, x.mean(0)), "adds something else than a bias of its own"),
        (lambda m, x, f: f(x).flatten(), "gives its rows another shape"),
        (lambda m, x, f: f(x.t()).t(), "computes aten.t too"),
    ],
)
def test_whatever_else_is_computed_is_named(change, reason):
    model = nn.Sequential(Changed(change), nn.Linear(K, K))
    x = torch.randn(K, K) if "aten.t" in reason else None
    if "another shape" in reason:
        model = nn.Sequential(model[0])
    assert reason in notes(model, x)["0.weight"]
    assert notes(nn.Sequential(Changed(lambda m, x, f: f(x)), nn.Linear(K, K)))["0.weight"] == "0"


def test_a_gate_counts_in_the_rank_that_the_model_calls_with():
    gated = Changed(lambda m, x, f: f(x).sigmoid() * x if x.ndim == 3 else f(x))
    assert notes(nn.Sequential(gated))["0.weight"] == "0"
    assert "computes aten.sigmoid" in notes(nn.Sequential(gated), torch.randn(2, 3, K))["0.weight"]


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K), (K,)])
def test_views_that_keep_the_rows_belong_to_a_linear(shape):
    """transformers' Conv1D: view(-1, K), addmm with a [K, N] weight, view back."""

    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(K, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 4)

    assert notes(nn.Sequential(Viewed()), torch.randn(shape)) == {"0.weight": "0"}


class Reads(nn.Module):
    """Reads its child's weight, and calls the child if `calls`."""

    def __init__(self, calls, read):
        super().__init__()
        self.child, self.calls, self.read = nn.Linear(K, K), calls, read

    def forward(self, x):
        return self.read(x, self.child.weight) + (self.child(x) if self.calls else 0)


def test_a_child_that_is_read_and_not_called_is_no_linear():
    product = lambda x, w: functional.linear(x, w)  # noqa: E731
    assert notes(nn.Sequential(Reads(False, product))) == {
        "0.child.weight": "0 reads the weight of 0.child and multiplies by it itself"
    }
    assert "0 reads the weight of 0.child" in notes(nn.Sequential(Reads(True, product)))["0.child.weight"]
    norm = notes(nn.Sequential(Reads(True, lambda x, w: w.norm())))
    assert norm["0.child.weight"] == "0 reads the weight too, by aten.linalg_vector_norm"


def test_an_attention_that_reads_its_projections_holds_no_linear():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(K, 2, batch_first=True), nn.Linear(K, K)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    found = notes(Attention(), torch.randn(2, 3, K))
    assert found["attention.in_proj_weight"] == "attention holds modules of its own"
    assert found["attention.out_proj.weight"].startswith("attention reads the weight of attention.out_proj")
    assert found["out.weight"] == "out"


def test_tied_tables_and_shared_weights_are_linears():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(16, K), nn.Linear(K, 16)
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
            self.head.weight, self.b.weight = self.table.weight, self.a.weight

        def forward(self, ids):
            return self.head(self.b(self.a(self.table(ids))))

    program = capture(Tied().eval(), (torch.randint(0, 16, (2, 3)),))
    assert [s.node.meta[MODULE] for s in find_sites(program)] == ["a", "b", "head"]


def test_a_module_under_two_paths_has_one():
    shared = nn.Linear(K, K)
    program = capture(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)).eval(), (torch.randn(3, K),))
    assert [s.node.meta[MODULE] for s in find_sites(program)] == ["0", "0"]


@pytest.mark.parametrize("kind", ["other tensors", "modules", "two results", "two arguments", "root"])
def test_what_a_replacement_could_not_do_is_no_linear(kind):
    model: nn.Module = nn.Sequential(Changed(lambda m, x, f: f(x)))
    expected = "holds tensors besides its weight and bias"
    if kind == "other tensors":
        model[0].adapter = nn.Parameter(torch.randn(2, K))
    elif kind == "modules":
        model[0].adapter, expected = nn.Identity(), "holds modules of its own"
    elif kind == "two results":
        model[0].change, expected = lambda m, x, f: (f(x), None), "gives tuple, not a tensor"
    elif kind == "two arguments":

        class Scaled(nn.Linear):
            def forward(self, x, scale=None):
                return super().forward(x)

        class Outer(nn.Sequential):
            def forward(self, x):
                return self[0](x, 2.0)

        model, expected = Outer(Scaled(K, K)), "is called with more than a tensor"
    else:
        model, expected = nn.Linear(K, K), "the model is itself this linear"
    (reason,) = notes(model).values()
    assert expected in reason


@pytest.mark.parametrize("changes", [False, True])
def test_hooks_that_only_look_do_not_count(changes):
    model, looked = nn.Sequential(nn.Linear(K, K)), []

    def hook(module, args, result):
        looked.append(result.abs().max())
        return result * 2 if changes else None

    model[0].register_forward_hook(hook)
    assert notes(model)["0.weight"] == ("0 computes aten.mul.Tensor too (it has hooks)" if changes else "0")


def test_the_random_generator_is_not_touched():
    before = torch.get_rng_state()
    notes(nn.Sequential(nn.Linear(K, K, bias=False)), torch.ones(3, K))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    nn.Linear(K, K, bias=False)
    assert torch.equal(torch.get_rng_state(), after)


def test_calls_of_other_models_are_not_recorded():
    mine, other = nn.Sequential(nn.Linear(K, K)), Changed(lambda m, x, f: (f(x),))
    with recorded_calls(mine) as odd:
        other(torch.ones(1, K))
        mine(torch.ones(1, K))
    assert not odd and not nn.modules.module._global_forward_hooks


class Calls(nn.Module):
    """A module and how it is called."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)


class Stored(nn.Module):
    """A product with a weight that is stored [N, K], or [K, N], and what `function` makes of it."""

    def __init__(self, function, shape=(K, K)):
        super().__init__()
        self.weight, self.bias, self.function = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(K)), function

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("function", [lambda m, x: torch.mm(x, m.weight), lambda m, x: x @ m.weight])
def test_products_without_a_bias_are_linears(function):
    model = nn.Sequential(Stored(function))
    model[0].bias = None
    assert notes(model)["0.weight"] == "0"


@pytest.mark.parametrize(
    "parameter,call,expected",
    [
        ("x", lambda m, x: m(x=x), "is called with the keyword x"),
        ("input", lambda m, x: m(input=x), "inner"),
        ("x", lambda m, x: m([x]), "is called with more than a tensor"),
        ("x", lambda m, x: m(x), "inner"),
    ],
)
def test_calls_that_a_replacement_does_not_know(parameter, call, expected):
    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x[0] if isinstance(x, list) else x)

    inner = nn.Linear(K, K) if parameter == "input" else Named(K, K)
    found = notes(Calls(inner, call))["inner.weight"]
    assert found == expected if expected == "inner" else expected in found


def test_no_hook_stays_on_the_model():
    model = nn.Sequential(nn.Linear(K, K))
    notes(model)
    assert not model._forward_hooks and not model[0]._forward_hooks


def test_products_that_share_a_weight_are_modules_together_or_not_at_all():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, K), Changed(lambda m, x, f: f(x) * 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + self.b(x)

    program = capture(Half().eval(), (torch.randn(3, K),))
    reasons = {site.node.meta.get(NO_MODULE) for site in find_sites(program)}
    assert len(reasons) == 1 and "computes aten.mul.Tensor too" in reasons.pop()


@pytest.mark.parametrize("call", [lambda m, x: m(x.view(-1, K)), lambda m, x: m(x).view(-1, K), lambda m, x: m(x)])
def test_views_outside_of_the_call_do_not_count(call):
    assert notes(Calls(nn.Linear(K, K), call), torch.randn(2, 3, K))["inner.weight"] == "inner"


def test_what_a_module_hands_on_besides_is_named():
    class Keeps(nn.Linear):
        def forward(self, x):
            self.kept = x.view(-1, K)
            return super().forward(self.kept).view(x.shape)

    def call(m, x):
        return m(x).sum() + m.kept.sum()

    assert (
        notes(Calls(Keeps(K, K), call), torch.randn(2, 3, K))["inner.weight"] == "inner hands on more than the product"
    )


@pytest.mark.parametrize(
    "shape,out",
    [
        ((2, 3, 2 * K), lambda x: (*x.shape[:2], 2, K)),
        ((2, 3, 2 * K), lambda x: x.shape),
        ((2, 3, K), lambda x: (-1, K)),
    ],
)
def test_channels_in_another_shape(shape, out):
    """By the input's own sizes: of constants the export would only ask that their product fits."""
    model = nn.Sequential(Stored(lambda m, x: functional.linear(x.view(-1, K), m.weight, m.bias).view(out(x))))
    assert notes(model, torch.randn(shape))["0.weight"] == "0 gives its rows another shape"


def test_hooks_that_look_at_weights_do_not_count():
    model, looked = nn.Sequential(nn.Linear(K, K)), []
    model[0].register_forward_hook(lambda m, args, result: looked.append(m.weight.abs().max()))
    assert notes(model)["0.weight"] == "0"


def test_a_transposed_weight_is_the_modules_own():
    model = nn.Sequential(Stored(lambda m, x: torch.addmm(m.bias, x, m.weight.t())))
    assert notes(model)["0.weight"] == "0"
    model = nn.Sequential(Stored(lambda m, x: torch.addmm(m.bias, x.t(), m.weight.t())))
    assert "computes aten.t too" in notes(model, torch.randn(K, K))["0.weight"]


def test_a_bias_that_broadcasts_is_no_bias():
    model = nn.Sequential(Stored(lambda m, x: torch.addmm(m.bias, x, m.weight.t())))
    model[0].bias = nn.Parameter(torch.randn(3, K))
    assert notes(model)["0.weight"] == "0 adds something else than a bias of its own"


def test_what_writes_to_memory_counts():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(K, K)
            self.seen = torch.zeros(K)

        def forward(self, x):
            return super().forward(x)

    def call(m, x):
        x[:, 0] = 0.0
        return m(x)

    assert notes(Calls(Counts(), call))["inner.weight"] == "inner"


def test_paths_do_not_hold_the_prefix_of_a_wrapper():
    model = nn.Sequential(nn.Linear(K, K))
    wrapper = nn.Sequential(model).eval()
    with recorded_calls(model) as odd:
        exported = torch.export.export(wrapper, (torch.randn(3, K),))
    assert not odd
    program = from_exported(exported, wrapper, "0.", find_linear_modules(model, odd, "0."))
    assert [site.node.meta[MODULE] for site in find_sites(program)] == ["0"]


class ChangedConv(nn.Conv1d):
    """A convolution whose forward is `change(module, x, convolution)`."""

    def __init__(self, change, **arguments):
        super().__init__(K, K, 3, **arguments)
        self.change = change

    def forward(self, x):
        return self.change(self, x, super().forward)


def conv_notes(model):
    program = capture(model.eval(), (torch.randn(3, K, 9),))
    return {s.name: s.node.meta.get(MODULE, s.node.meta.get(NO_MODULE)) for s in find_conv_sites(program)}


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda m, x, f: f(x) * 1.0001, "computes aten.mul.Tensor too"),
        (lambda m, x, f: f(x).flatten(1), "gives its values another shape"),
        (lambda m, x, f: f(functional.pad(x, (1, 1))), "computes aten.pad too"),
        (lambda m, x, f: functional.conv1d(x, m.weight, x.mean((0, 2))), "adds something else than a bias of its own"),
        (lambda m, x, f: functional.conv1d(x, m.weight), "holds tensors besides its weight and bias"),
        (lambda m, x, f: f(x), "0"),
    ],
)
def test_convolutions_are_read_in_the_same_way(change, reason):
    found = conv_notes(nn.Sequential(ChangedConv(change)))
    assert reason in found.get("0.weight", "adds something else than a bias of its own")


def test_a_convolution_with_a_transposed_weight_is_no_module():
    transposed = ChangedConv(lambda m, x, f: functional.conv1d(x, m.weight.transpose(0, 1), m.bias))
    assert "0.weight" not in conv_notes(nn.Sequential(transposed, nn.Conv1d(K, K, 1)))
    assert conv_notes(nn.Sequential(transposed, nn.Conv1d(K, K, 1)))["1.weight"] == "1"


def test_scripted_modules_take_no_hooks():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(K, K)))
    model = nn.Sequential(nn.Linear(K, K), scripted)
    assert modules_with_hooks(model) == [model, model[0]]
    with recorded_calls(model) as odd:
        model(torch.randn(2, K))
    assert odd == {}
