"""Export a module that holds quantized linears to an ONNX folder, and prove it by running it.

trace -> Program -> rewrite (fuse_all.py) -> torch.onnx with our translations -> ONNX Runtime against the module
(variants.py).
A decoder is traced with its key/value cache as plain tensors: inputs `input_ids [batch, sequence]`,
`attention_mask [batch, past + sequence]`, `past_key_values.i.key/value`; outputs `logits` and
`present.i.key/value`. The number and the shape of the caches are read from one eager call.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qcompile.codegen.onnx.fuse_all import rewrite
from qcompile.codegen.onnx.fusions.attention.decompose_sdpa import spell_out
from qcompile.codegen.onnx.fusions.attention.int8_kv_cache import CodedCache, hold_codes
from qcompile.codegen.onnx.fusions.int8_embedding import round_tables
from qcompile.codegen.onnx.fusions.last_token_logits import only_last
from qcompile.codegen.onnx.fusions.moe import split_experts
from qcompile.codegen.onnx.genai_config import write_genai_config
from qcompile.codegen.onnx.lowering.compact_scales import split_scales
from qcompile.codegen.onnx.ops.translate import table
from qcompile.codegen.onnx.sentence_embedding import Pooled, Pooling, write_pooling
from qcompile.codegen.onnx.tracing.onnx_linear import Hadamard, NoOnnxForm, OnnxLinear, check_forms
from qcompile.codegen.onnx.tracing.signature import Plain, WithCache
from qcompile.codegen.onnx.variants import expected, finish
from qcompile.codegen.onnx.verify_outputs import holding
from qcompile.ir.capture import from_exported
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program, copy_graph
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.recipe.report import PassReport

MODEL = "model.onnx"

_MANY = 2**30  # tokens, where a tokenizer sets no limit


@dataclass(frozen=True)
class Exported:
    """What came out.

    Attributes:
        error: the largest relative difference (of norms) to the module, computed in float.
        as_run: the same with the accuracy level that the file asks for.
        rewritten: what became operators of ONNX Runtime, and what did not and why.
    """

    error: float
    as_run: float
    rewritten: PassReport


@dataclass(frozen=True)
class OnnxOptions:
    """What kind of file.

    Attributes:
        accuracy_level: of MatMulNBits: 4 rounds activations to int8 in blocks while multiplying, 1 does not.
        low_memory: multiply dual-grained weights by their 4-bit codes only.
        last_logits: of a decoder, only those of each text's last token, [B, 1, V].
        chunk: how many tokens of a prompt onnxruntime-genai reads at once.
        portable: operators of the standard (opset 21) only.
        float_embeddings: leave tables of embeddings in float32.
        pooling: of an encoder, how its tokens become one embedding, a second output; None: not at all.
    """

    accuracy_level: int = 4
    low_memory: bool = False
    last_logits: bool = False
    chunk: int | None = None
    portable: bool = False
    float_embeddings: bool = False
    pooling: Pooling | None = None


def export_module(
    model: nn.Module, folder: Path, layout: OnnxOptions = OnnxOptions(), *, example: Any = None, tokenizer: Any = None,
    cache: CodedCache | None = None,
) -> Exported:  # fmt: skip
    """Write model.onnx (+ model.onnx.data) into an existing folder.

    Args:
        model: float32 or castable; left as it is. folder: where to write. layout: what kind of file.
        example: keyword arguments of a module without a cache; None for a causal LM.
        tokenizer: saved beside the model. cache: in int8 codes; None: it is float.

    Raises:
        NoOnnxForm: formats without an operator (before any work); once the graph is known, stacks of experts that
            are not multiplied as rows sorted by expert, or attentions that cannot read such a cache.
        ExportMismatch: wrong results.
    """
    check_forms(model, layout.portable)
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        model = copy.deepcopy(model).float()
    model.eval()
    is_quantized = any(isinstance(m, QuantLinear | QuantStack) for m in model.modules())
    if layout.pooling is not None:
        model = Pooled(model, layout.pooling).eval()
    with _onnx_linears(model, layout.portable), torch.no_grad(), _quiet():
        positions = _longest(getattr(model, "config", None))
        wrapper = WithCache(model, positions) if example is None else Plain(model, example)
        exported = torch.export.export(
            wrapper, wrapper.arguments(), dynamic_shapes=wrapper.dynamic_shapes(), strict=False
        )
        program = from_exported(exported, wrapper)
        experts = split_experts(program, layout.portable)
    if isinstance(wrapper, Plain):
        wrapper.note_sizes([node.meta["val"] for node in program.inputs])
    rewritten, shared = (
        (PassReport("operators of the standard"), [])
        if layout.portable
        else rewrite(program, None if isinstance(wrapper, Plain) else positions)
    )
    if spelled := spell_out(program):
        rewritten.notes.append(f"{spelled} attentions in operators of the standard")
    if is_quantized and not layout.float_embeddings:
        shared += round_tables(program, {name for name, _ in wrapper.named_parameters()}, rewritten)
    if experts:
        rewritten.notes.append(f"{experts} products of experts, each by its own rows")
    if layout.last_logits:
        if (obstacle := only_last(program)) is not None:
            raise NoOnnxForm(f"last_logits: {obstacle.reason} (node {obstacle.node})")
        assert isinstance(wrapper, WithCache)
        wrapper.only_last()
    if cache is not None:
        assert isinstance(wrapper, WithCache)
        hold_codes(program, wrapper, cache, rewritten)
    with torch.no_grad(), _quiet():
        graph = torch.onnx.export(
            torch.export.export(
                as_module(program),
                tuple(wrapper.flat(wrapper.arguments())),
                dynamic_shapes=tuple(wrapper.flat_shapes()),
                strict=False,
            ),
            dynamo=True,
            opset_version=21,
            input_names=wrapper.input_names,
            output_names=wrapper.output_names,
            custom_translation_table=table(layout.portable),
            optimize=True,
            verbose=False,
        )
        assert graph is not None
        _name_dimensions(graph.model, wrapper, program)
        for part in graph.model.graph.all_nodes():
            part.metadata_props.clear()  # where it comes from in PyTorch: longer than the node
        split_scales(graph.model)
        graph.save(str(folder / MODEL), external_data=True)
    if isinstance(wrapper, WithCache):
        _describe(wrapper, program, folder, positions, layout.chunk)
    if layout.pooling is not None:
        width = int(program.outputs[0].meta["val"].shape[-1])
        longest = min(_longest(model.config), getattr(tokenizer, "model_max_length", _MANY))
        write_pooling(folder, layout.pooling, width, longest)
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(str(folder))
    del exported, program, graph  # their weights lie in the file now, and the proof needs the room
    with torch.no_grad(), holding(wrapper, shared):  # the quantized linears are back
        must = expected(folder / MODEL, wrapper, low_memory=layout.low_memory)
    del shared  # so do its numbers
    error, as_run = finish(folder / MODEL, wrapper, must, layout.accuracy_level, portable=layout.portable)
    return Exported(error, as_run, rewritten)


def _longest(config: Any) -> int:
    """How many tokens a model says that it takes; 4096 if it does not say."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), 4096)


def _describe(wrapper: WithCache, program: Program, folder: Path, positions: int, chunk: int | None) -> None:
    """Write genai_config.json.

    A cache in a buffer of the greatest length, extended in place, has no length of its own any more: only where
    nothing but the attentions looks at it can it be one.
    """
    groups, size = wrapper.shapes[0]
    attentions = program.graph.find_nodes(op="call_function", target=torch.ops.qcompile_onnx.group_attention.default)
    consumers = {user for cache in program.inputs[2:] for user in cache.users if user not in attentions}
    in_place = all(user.target is torch.ops.aten.sym_size.int and user.args[1] != 2 for user in consumers)
    heads = {node.args[9] for node in attentions} or {groups}
    logits = program.outputs[0].meta["val"].shape[-1]
    hidden = wrapper.model.get_input_embeddings().embedding_dim
    write_genai_config(
        folder, getattr(wrapper.model, "config", None), getattr(wrapper.model, "generation_config", None),
        layers=len(wrapper.shapes) // 2, heads=max(heads), groups=groups, size=size, vocabulary=int(logits),
        hidden=hidden, positions=positions, in_place=in_place, chunk=chunk,
    )  # fmt: skip


def as_module(program: Program) -> nn.Module:
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
            held = module.graph.get_attr(buffer)
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
        module.graph.erase_node(node)
    return fx.GraphModule(module, module.graph)  # torch.export reads the signature of forward, which a lazy one has not


def _name_dimensions(model: Any, wrapper: Any, program: Program) -> None:
    """Give the free dimensions the names that ONNX tools expect, and outputs of our own nodes their types."""
    import onnx_ir as ir

    for value, names in zip(model.graph.inputs, wrapper.dimensions, strict=True):
        value.shape = ir.Shape([names.get(i, d) for i, d in enumerate(value.shape)])
    for value, names, node in zip(model.graph.outputs, wrapper.out_dimensions, program.outputs, strict=True):
        made = node.meta["val"]
        value.shape = ir.Shape([names.get(i, d if isinstance(d, int) else None) for i, d in enumerate(made.shape)])
        if made.dtype in (torch.int8, torch.float32):  # which the exporter does not know behind our own nodes
            value.type = ir.TensorType(ir.DataType.INT8 if made.dtype == torch.int8 else ir.DataType.FLOAT)


@contextlib.contextmanager
def _onnx_linears(model: nn.Module, portable: bool) -> Iterator[None]:
    """Put ONNX forms in the place of quantized linears, and the originals back afterwards."""
    found: Sequence[tuple[str, nn.Module]] = [
        (path, m) for path, m in model.named_modules() if isinstance(m, (QuantLinear, RotatedLinear))
    ]
    try:
        for path, module in found:
            if isinstance(module, QuantLinear):
                model.set_submodule(path, OnnxLinear(module, portable))
            else:
                model.set_submodule(path, nn.Sequential(Hadamard(module.signs), module.inner))
        yield
    finally:
        for path, module in found:
            model.set_submodule(path, module)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
