"""Whole models in terms of the Triton operators: which, how many, and the same numbers."""

from __future__ import annotations

import collections

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import ZOO, build, example

import qcompile
from qcompile.api.example_inputs import widen_batch
from qcompile.codegen.triton.gpu_lowering import lower
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.spec import parse
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.ir.capture import capture
from qcompile.ir.node_meta import WEIGHT
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse, LoRC, Quantize
from qcompile.recipe.certificate import widen
from qcompile.recipe.recipe import Recipe

kernels = torch.ops.qcompile_triton


def lowered(model, batch, recipe, **how):
    """The program of a model after quantizing, and in terms of the kernels."""
    qcompile.quantize(model, recipe, [batch], progress=False)
    program = capture(model, *widen_batch((), batch))
    found = program.copy()
    chosen = lower(found, lambda kind, codes, make: make(), **how)
    inputs = widen([batch[name] for name in batch], torch.float16)
    return program, found, inputs, chosen


def counts(program):
    """What there is, how many: operators, what row_quant begins with, and epilogues."""
    found = collections.Counter()
    for node in program.graph.nodes:
        if node.target is kernels.row_quant.default:
            spec = parse(node.args[8])
            found.update(["row_quant", spec.first] + ["hadamard"] * bool(spec.hadamard))
            found.update(["sum"] * spec.residual + ["value"] * spec.value + ["smooth"] * spec.smooth)
        elif node.target in (kernels.linear_w.default, kernels.linear_a8.default):
            found[str(node.target).split(".")[1]] += 1
            found.update(name for name, at in (("residual", 5), ("up", 7)) if node.args[at] is not None)
        elif "qcompile" in str(node.target):
            found["dialect"] += 1
    return dict(found)


MODELS = [name for name in ZOO if name not in ("mixtral", "qwen2_moe")]  # experts have no kernel yet


def compared(name, recipe):
    """A model quantized, lowered, and compared; the lowered program, its inputs and its kernels.

    The bound is what quantizing changes: where a sum is rounded once and not twice, values fall to other sides.
    """
    model, batch = build(name).half(), example(name)
    batch = {key: value.half() if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        plain = model(**batch)[0].float()
    program, found, inputs, chosen = lowered(model, batch, recipe)
    want, got = program(*inputs)[0].float(), found(*inputs)[0].float()
    assert float((got - want).norm()) <= max(1e-3 * float(want.norm()), 1.5 * float((want - plain).norm()))
    return found, inputs, chosen


@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name, recipe):
    found, inputs, chosen = compared(name, recipe)
    assert "dialect" not in counts(found) and set(chosen) and "dequantize, then" not in str(chosen)
    on_gpu = fake_outputs(found, inputs)
    assert [tuple(o.shape) for o in on_gpu] == [tuple(o.shape) for o in found(*inputs)]
    assert {o.device.type for o in on_gpu} == {"cuda"}


def fake_outputs(program, inputs):
    """The outputs of the program on a GPU that is not there."""
    program, gpu = program.copy(), torch.device("cuda")
    for node in program.graph.nodes:  # what the model makes on its own device, and moves there
        if node.target is torch.ops.aten.to.device:  # torch without CUDA knows no such move, though all is there
            node.target, node.args = torch.ops.aten.to.dtype, (node.args[0], node.args[2])
        node.args, node.kwargs = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: gpu if isinstance(a, torch.device) else a
        )
    with FakeTensorMode():

        def there(tensor):
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        rest, values = iter(inputs), []
        for node in program.placeholders:
            values.append(there(program.weights[node.meta[WEIGHT]] if WEIGHT in node.meta else next(rest)))
        outputs = torch.fx.Interpreter(program.graph_module).run(*values)
        return [o for o in outputs if isinstance(o, torch.Tensor)]


@pytest.mark.parametrize(
    "name,recipe,want",
    [
        # two layers: norms before attention and feed-forward, a gate, sums behind both
        ("llama", "int8", dict(row_quant=8, rms=4, gate=2, none=2, linear_a8=14, linear_w=1, residual=4)),
        ("llama", "int8-rotated", {"row_quant": 8, "rms": 4, "gate": 2, "hadamard": 2, "none": 2} | dict(
            linear_a8=14, linear_w=1, residual=4)),
        ("llama", "w4a16", dict(linear_w=15, residual=4)),
        ("gpt2", "w4a8", dict(row_quant=8, layer=4, none=4, linear_a8=8, linear_w=1, residual=4)),
        ("llama", "fp8", dict(row_quant=8, rms=4, gate=2, none=2, linear_a8=14, linear_w=1, residual=4)),
        # norms behind the sums: what is quantized is read by the sum too, so the kernel writes both
        ("bert", "int8", dict(row_quant=8, layer=4, value=4, none=4, linear_a8=12, linear_w=1, residual=4)),
    ],
)  # fmt: skip
def test_what_is_fused(name, recipe, want):
    assert counts(compared(name, recipe)[0]) == want


def test_a_correction_is_an_epilogue():
    int4 = Format.parse("int4/group32/zero")
    recipe = Recipe("lorc", (Quantize(int4, None), LoRC(rank=4), Fuse()))
    program, found, inputs, _ = lowered(build("llama").half(), example("llama"), recipe)
    assert counts(found) == dict(linear_w=15, up=15, residual=4)
    want, got = program(*inputs)[0].float(), found(*inputs)[0].float()
    assert float((got - want).norm()) <= 2e-3 * float(want.norm())


def test_formats_without_a_kernel_are_dequantized():
    fp4 = Format.parse("fp4/group32")
    recipe = Recipe("fp4", (Quantize(fp4, None, lm_head=fp4), Fuse()))
    program, found, inputs, chosen = lowered(build("llama").half(), example("llama"), recipe)
    assert {label for by_rows in chosen.values() for label in by_rows.values()} == {"dequantize, then cuBLAS"}
    assert torch.allclose(program(*inputs)[0].float(), found(*inputs)[0].float(), atol=2e-3)


def test_fp8_products_need_a_gpu_that_has_them():
    found = lowered(build("llama").half(), example("llama"), "fp8", here=Gpu(capability=(8, 0)))[1]
    assert counts(found) == dict(dialect=14, linear_w=1)  # nor casts to it


def test_another_reader_keeps_its_value():
    """A product that two read cannot take the sum of one into its epilogue; a norm's value is written for the other."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
            self.norm = torch.nn.RMSNorm(64)

        def forward(self, x):
            y = self.norm(x)
            z = self.a(y)
            return self.b(z + x) + y, z

    model, x = Two().half(), torch.randn(3, 64).half()
    int8 = Format("int8")
    recipe = Recipe("two", (Quantize(int8, int8, lm_head=int8, lm_head_act=int8), Fuse()))
    qcompile.quantize(model, recipe, example=x, progress=False)
    program = capture(model, (x,))
    found = program.copy()
    lower(found, lambda kind, codes, make: make())
    assert counts(found) == dict(row_quant=2, rms=1, value=1, none=1, linear_a8=2, residual=1)
    for got, want in zip(found(x), program(x), strict=True):
        assert torch.allclose(got, want, atol=2e-2)


def arguments(op):
    torch.manual_seed(0)
    if op == "linear_w":
        form = Format.parse("int4/group32/zero")
        q = quantize_tensor(torch.randn(24, 64), form)
        packed, scale, zero = prepare(q.stored(), q.scale, q.zero, None, form, 64)
        more = torch.randn(24), torch.randn(2, 3, 24), torch.randn(2, 3, 4), torch.randn(24, 4)
        return (torch.randn(2, 3, 64), packed, scale, zero, *more, str(form), 64)
    if op == "linear_a8":
        x, w = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((2, 3, 64), (24, 64)))
        return (x, torch.rand(2, 3, 1), w, torch.rand(24, 1), torch.randn(24), None, None, None, torch.float16)
    x = torch.randn(2, 3, 64).half()
    return (
        x,
        x,
        None,
        torch.ones(64),
        None,
        None,
        torch.ones(64),
        1e-5,
        "row_quant/fp16/first=rms/residual/value/hadamard=64",
    )


@pytest.mark.parametrize("op", ["linear_w", "linear_a8", "row_quant"])
def test_opcheck(op):
    torch.library.opcheck(getattr(kernels, op), arguments(op))


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
def test_free_sizes_stay_free(name, recipe):
    """Lowered once for any batch and length: nothing is fixed to the sizes that were seen."""
    program, found, _, _ = lowered(build(name).half(), example(name), recipe)
    assert counts(found)["residual"] > 0
    for shape in ((1, 1), (3, 11)):
        ids = torch.randint(3, 128, shape)
        got, want = found(ids)[0].float(), program(ids)[0].float()
        assert got.shape == want.shape and float((got - want).norm()) < 3e-2 * float(want.norm())
