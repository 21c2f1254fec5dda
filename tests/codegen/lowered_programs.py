"""Models quantized and lowered to the Triton operators, what operators they have, and their outputs."""

from __future__ import annotations

import collections

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import build, example

import qcompile
from qcompile.api.example_inputs import widen_batch
from qcompile.codegen.triton.gpu_lowering import lower_to_gpu
from qcompile.codegen.triton.kernels.parse_spec import parse
from qcompile.codegen.triton.triton_op_calls import (
    LinearA8Call,
    LinearGroupCall,
    LinearW4A8Call,
    LinearWCall,
    RowQuantCall,
)
from qcompile.ir.capture import capture
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.op_calls import OUR_OPS
from qcompile.recipe.certificate import widen


def make_always(layout, sources, make):
    """Instead of a weight cache: everything is made anew."""
    return make()


def lowered(model, batch, recipe, **gpu):
    """The program of a model after quantizing, the same lowered, inputs for both, and the kernels of the sites."""
    qcompile.quantize(model, recipe, [batch], progress=False)
    program = capture(model, *widen_batch((), batch))
    found = program.copy()
    chosen = lower_to_gpu(found, make_always, **gpu)
    inputs = widen([batch[name] for name in batch], torch.float16)
    return program, found, inputs, chosen


def lowered_module(module, x, recipe):
    """The same of a module of the test's own, without inputs and kernels."""
    model = module.half()
    qcompile.quantize(model, recipe, example=x, progress=False)
    program = capture(model, (x,))
    found = program.copy()
    lower_to_gpu(found, make_always)
    return program, found


def row_quants(program):
    """The specs of all row_quant calls."""
    return [parse(call.spec) for _, call in RowQuantCall.find(program)]


def counts(program):
    """How many of each: operators, what row_quant begins with, and epilogues."""
    found = collections.Counter()
    for spec in row_quants(program):
        found.update(["row_quant", spec.first] + ["hadamard"] * bool(spec.hadamard))
        found.update(["sum"] * spec.residual + ["value"] * spec.value + ["smooth"] * spec.smooth)
    for kind in (LinearWCall, LinearA8Call, LinearW4A8Call, LinearGroupCall):
        name = kind.target._schema.name.partition("::")[2]
        for _, call in kind.find(program):
            found[name] += 1
            found.update(operand for operand in ("residual", "up") if getattr(call, operand) is not None)
    found.update("dialect" for node in program.graph.nodes if node.target in OUR_OPS)
    return dict(found)


def compared(name, recipe):
    """A model quantized, lowered, and compared; the lowered program, its inputs and its kernels.

    The bound is what quantizing changes: where a sum is rounded once and not twice, values are rounded to other codes.
    """
    model, batch = build(name).half(), example(name)
    batch = {key: value.half() if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        plain = model(**batch)[0].float()
    program, found, inputs, chosen = lowered(model, batch, recipe)
    want, got = program(*inputs)[0].float(), found(*inputs)[0].float()
    assert float((got - want).norm()) <= max(1e-3 * float(want.norm()), 1.5 * float((want - plain).norm()))
    return found, inputs, chosen


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

        def on_gpu(tensor):
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        rest, values = iter(inputs), []
        for node in program.placeholders:
            values.append(on_gpu(program.weights[node.meta[WEIGHT]] if WEIGHT in node.meta else next(rest)))
        outputs = torch.fx.Interpreter(program.graph_module).run(*values)
        return [o for o in outputs if isinstance(o, torch.Tensor)]
