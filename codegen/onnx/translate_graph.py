"""From a rewritten program to an ONNX graph, by torch.onnx and our translations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qcompile.codegen.onnx.lowering.compact_scales import compact_scales
from qcompile.codegen.onnx.ops.translate import translation_table
from qcompile.codegen.onnx.tracing.quiet import quiet_exporter
from qcompile.codegen.onnx.tracing.signature import Signature
from qcompile.codegen.onnx.tracing.trace import Traced
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program, copy_graph

OPSET = 21


def translate(traced: Traced, path: Path, contrib_ops: bool) -> None:
    """Write the graph to `path`, its weights beside it; its quantized linears have no kernels yet (variants.py).

    Args:
        traced: a module, and its rewritten program.
        path: of model.onnx.
        contrib_ops: whether the file may use operators of ONNX Runtime beside those of the ONNX standard.
    """
    module, program = traced.module, traced.program
    with torch.no_grad(), quiet_exporter():
        exported = torch.export.export(
            to_module(program),
            tuple(module.flatten(module.sample_inputs())),
            dynamic_shapes=tuple(module.flat_dynamic_shapes()),
            strict=False,
        )
        graph = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=module.signature.input_names,
            output_names=module.signature.output_names,
            custom_translation_table=translation_table(contrib_ops=contrib_ops),
            optimize=True,
            verbose=False,
        )
        assert graph is not None
        _set_shapes(graph.model, module.signature, program)
        for node in graph.model.graph.all_nodes():
            node.metadata_props.clear()  # where it comes from in PyTorch: longer than the node
        compact_scales(graph.model)
        graph.save(str(path), external_data=True)


def to_module(program: Program) -> nn.Module:
    """The program as a module of its inputs, its weights as buffers of their own names."""
    module = copy_graph(program.graph_module)
    for index, node in enumerate(list(module.graph.find_nodes(op="placeholder"))):
        name = node.meta.get(WEIGHT)
        if name is None:
            continue
        buffer = "w_" + "".join(c if c.isalnum() else "_" for c in name)
        buffer = buffer if not hasattr(module, buffer) else f"{buffer}_{index}"
        module.register_buffer(buffer, program.weights[name])
        with module.graph.inserting_before(node):
            read = module.graph.get_attr(buffer)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        module.graph.erase_node(node)
    return fx.GraphModule(module, module.graph)  # torch.export reads the signature of forward, which a lazy one has not


def _set_shapes(model: Any, signature: Signature, program: Program) -> None:
    """Give dynamic sizes the names that ONNX tools expect, and outputs of our own operators their types."""
    import onnx_ir as ir

    for value, tensor in zip(model.graph.inputs, signature.inputs, strict=True):
        value.shape = ir.Shape([tensor.axes.get(i, d) for i, d in enumerate(value.shape)])
    for value, tensor, node in zip(model.graph.outputs, signature.outputs, program.outputs, strict=True):
        fake = node.meta["val"]
        sizes = [d if isinstance(d, int) else None for d in fake.shape]
        value.shape = ir.Shape([tensor.axes.get(i, d) for i, d in enumerate(sizes)])
        if fake.dtype in (torch.int8, torch.float32):  # which the exporter does not know behind our own operators
            value.type = ir.TensorType(ir.DataType.INT8 if fake.dtype == torch.int8 else ir.DataType.FLOAT)
