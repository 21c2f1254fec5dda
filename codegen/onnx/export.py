"""Export a module that holds quantized linears to an ONNX folder, and prove it by running it.

trace -> Program -> rewrite (rewrite.py) -> torch.onnx with our translations -> ONNX Runtime against the module.
A decoder is traced with its key/value cache as plain tensors: inputs `input_ids [batch, sequence]`,
`attention_mask [batch, past + sequence]`, `past_key_values.i.key/value`; outputs `logits` and
`present.i.key/value`. The number and the shape of the caches are read from one eager call.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.capture import from_exported
from qcompile.codegen.onnx.genai import write_genai_config
from qcompile.codegen.onnx.linear import Hadamard, NoOnnxForm, OnnxLinear, refusal
from qcompile.codegen.onnx.rewrite import rewrite
from qcompile.codegen.onnx.tables import Shared
from qcompile.codegen.onnx.translate import table
from qcompile.expert_stack import QuantStack
from qcompile.module import QuantLinear, RotatedLinear
from qcompile.program import WEIGHT, Program, copy_graph
from qcompile.report import PassReport

MODEL = "model.onnx"


class ExportMismatch(ValueError):
    """The exported model does not compute what the module does; the text holds the error."""


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


def export_module(
    model: nn.Module, folder: Path, *, example: Any = None, tokenizer: Any = None, accuracy_level: int = 4
) -> Exported:
    """Write model.onnx (+ model.onnx.data) into an existing folder.

    Args:
        model: float32 or castable; left as it is. folder: where to write.
        example: keyword arguments of a module without a cache; None for a causal LM.
        tokenizer: saved beside the model.
        accuracy_level: of MatMulNBits: 4 rounds activations to int8 in blocks while multiplying, 1 does not.

    Raises:
        NoOnnxForm: formats without an operator (before any work). ExportMismatch: wrong results.
    """
    if accuracy_level not in (1, 4):
        raise NoOnnxForm(f"accuracy_level {accuracy_level}: 1 multiplies in float32, 4 in int8")
    check_forms(model)
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        model = copy.deepcopy(model).float()
    model.eval()
    with _onnx_linears(model), torch.no_grad(), _quiet():
        wrapper = _WithCache(model) if example is None else _Plain(model, example)
        exported = torch.export.export(
            wrapper, wrapper.arguments(), dynamic_shapes=wrapper.dynamic_shapes(), strict=False
        )
        program = from_exported(exported, wrapper)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", 4096) if example is None else None
    rewritten, shared = rewrite(program, positions)
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
            custom_translation_table=table(1),
            optimize=True,
            verbose=False,
        )
        assert graph is not None
        _name_dimensions(graph.model, wrapper)
        graph.save(str(folder / MODEL), external_data=True)
    with torch.no_grad(), _holding(wrapper, shared), _numbers(wrapper):  # the quantized linears are back
        checks = wrapper.checks()
    # A value on the edge of a rounding step may fall to either side: one int8 step, not a wrong law.
    rounded = any(isinstance(m, QuantLinear) and m.act is not None for m in wrapper.modules())
    error = as_run = _prove(folder / MODEL, wrapper, checks, 5e-2 if rounded else 1e-3)
    if accuracy_level != 1:
        set_accuracy_level(folder / MODEL, accuracy_level)
        as_run = _prove(folder / MODEL, wrapper, checks, math.inf)  # how much, not whether: it rounds on purpose
    if isinstance(wrapper, _WithCache):
        _describe(wrapper, program, folder, positions or 0)
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(str(folder))
    return Exported(error, as_run, rewritten)


def _describe(wrapper: _WithCache, program: Program, folder: Path, positions: int) -> None:
    """Write genai_config.json.

    A cache in a buffer of the greatest length, extended in place, has no length of its own any more: only where
    nothing but the attentions looks at it can it be one.
    """
    groups, size = wrapper.shapes[0]
    attentions = program.graph.find_nodes(op="call_function", target=torch.ops.qcompile_onnx.group_attention.default)
    readers = {user for cache in program.inputs[2:] for user in cache.users if user not in attentions}
    in_place = all(user.target is torch.ops.aten.sym_size.int and user.args[1] != 2 for user in readers)
    heads = {node.args[9] for node in attentions} or {groups}
    logits = program.outputs[0].meta["val"].shape[-1]
    hidden = wrapper.model.get_input_embeddings().embedding_dim
    write_genai_config(
        folder, getattr(wrapper.model, "config", None), getattr(wrapper.model, "generation_config", None),
        layers=len(wrapper.shapes) // 2, heads=max(heads), groups=groups, size=size, vocabulary=int(logits),
        hidden=hidden, positions=positions, in_place=in_place,
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
    module.recompile()
    return module


def set_accuracy_level(path: Path, level: int) -> None:
    """Rewrite the accuracy_level of every MatMulNBits of a file; its external data stays."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    onnx.save(model, str(path))


def check_forms(model: nn.Module) -> None:
    """Refuse every site without an ONNX form, all at once."""
    bad = {
        path: reason
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear) and (reason := refusal(module)) is not None
    }
    bad |= {
        path: "a stack of experts: ONNX Runtime has no operator for its products"
        for path, module in model.named_modules()
        if isinstance(module, QuantStack)
    }
    if bad:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in list(bad.items())[:20])
        raise NoOnnxForm(
            f"{len(bad)} sites have no ONNX form:\n{lines}\n"
            "Use int8, w8a16, w4a16 or w4a8, or a rule that keeps them in float."
        )


Check = tuple[tuple[Any, ...], list[Tensor]]  # arguments, and what the module makes of them


def _check(module: nn.Module, arguments: tuple[Any, ...]) -> Check:
    return arguments, torch.utils._pytree.tree_leaves(module(*arguments))


class _WithCache(nn.Module):
    """A causal LM whose cache is a list of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            layers = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values.layers
        self.shapes = [
            (tuple(p.shape[1:2]) + tuple(p.shape[3:])) for layer in layers for p in (layer.keys, layer.values)
        ]
        names = [f"{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
        self.input_names = ["input_ids", "attention_mask", *[f"past_key_values.{n}" for n in names]]
        self.output_names = ["logits", *[f"present.{n}" for n in names]]
        batch, past = "batch", "past_sequence"
        self.dimensions = [{0: batch, 1: "sequence"}, {0: batch, 1: "total_sequence"}]
        self.dimensions += [{0: batch, 2: past} for _ in self.shapes]
        self.out_dimensions = [{0: batch, 1: "sequence"}] + [{0: batch, 2: "total_sequence"} for _ in self.shapes]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for index in range(len(past) // 2):
            cache.update(past[2 * index], past[2 * index + 1], index)
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return out.logits, [part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)]

    def arguments(self, batch: int = 2, length: int = 3, past: int = 5) -> tuple[Any, ...]:
        """Random inputs of given sizes."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        mask = torch.ones(batch, past + length, dtype=torch.long)
        cache = [torch.randn(batch, h, past, d, generator=generator) for h, d in self.shapes]
        return ids, mask, cache

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Batch, length and past are free."""
        free = torch.export.Dim.DYNAMIC
        return {0: free, 1: free}, {0: free, 1: free}, [{0: free, 2: free} for _ in self.shapes]

    def checks(self) -> list[Check]:
        """Prefill from nothing, for one and two rows, and continuations of the cache that it leaves.

        Several tokens behind a cache are for one row only: GroupQueryAttention takes no more.
        """
        found = [_check(self, self.arguments(1, 7, 0)), _check(self, self.arguments(2, 4, 0))]
        for rows, length in ((1, 1), (1, 3), (2, 1)):
            (_, mask, _), (_, *cache) = found[rows - 1]
            more = self.arguments(rows, length, 0)[0]
            found.append(_check(self, (more, torch.cat([mask, torch.ones_like(more)], dim=1), cache)))
        return found

    def flat(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        return [arguments[0], arguments[1], *arguments[2]]

    def flat_shapes(self) -> list[Any]:
        ids, mask, caches = self.dynamic_shapes()
        return [ids, mask, *caches]


class _Plain(nn.Module):
    """A module without a cache, called with keyword arguments."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model = model
        self.example = dict(example) if isinstance(example, dict) else {"input": example}
        self.keyword = isinstance(example, dict)
        self.input_names = list(self.example)
        with torch.no_grad():
            outputs = self.forward(*self.example.values())
        self.output_names = [f"output_{i}" if i else "output" for i in range(len(outputs))]
        self.dimensions = [{0: "batch", 1: "sequence"} if v.ndim == 2 else {0: "batch"} for v in self.example.values()]
        self.out_dimensions: list[dict[int, str]] = [{} for _ in outputs]

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self.example, values, strict=True))) if self.keyword else self.model(*values)
        if isinstance(out, Tensor):
            return (out,)
        parts = out.to_tuple() if hasattr(out, "to_tuple") else tuple(out)
        return tuple(p for p in parts if isinstance(p, Tensor))

    def arguments(self) -> tuple[Any, ...]:
        return tuple(torch.cat([v, v]) if v.shape[0] == 1 else v for v in self.example.values())

    def dynamic_shapes(self) -> Any:
        auto = torch.export.Dim.AUTO
        return (tuple({d: auto for d in named} for named in self.dimensions),)

    def checks(self) -> list[Check]:
        whole = self.arguments()
        return [_check(self, whole), _check(self, tuple(v[:1] for v in whole))]

    def flat(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        return list(arguments)

    def flat_shapes(self) -> list[Any]:
        return list(self.dynamic_shapes()[0])


def _name_dimensions(model: Any, wrapper: Any) -> None:
    """Give the free dimensions the names that ONNX tools expect."""
    import onnx_ir as ir

    sides = ((model.graph.inputs, wrapper.dimensions), (model.graph.outputs, wrapper.out_dimensions))
    for values, names in sides:
        for value, named in zip(values, names, strict=False):
            if value.shape is None:
                continue
            sizes = [named.get(i, d) for i, d in enumerate(value.shape)]
            value.shape = ir.Shape(sizes)


def _prove(path: Path, wrapper: Any, checks: list[Check], tolerance: float) -> float:
    """Open the file in ONNX Runtime and compare it with the module."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for arguments, want in checks:
        feeds = {n: t.numpy() for n, t in zip(wrapper.input_names, wrapper.flat(arguments), strict=True)}
        for name, mine, theirs in zip(wrapper.output_names, session.run(None, feeds), want, strict=True):
            reference = theirs.float()
            difference = torch.from_numpy(mine).float() - reference
            error = float(difference.norm()) / max(float(reference.norm()), 1e-6)
            if not error <= tolerance:
                raise ExportMismatch(
                    f"ONNX output {name} differs from the module by {error:.2e} (allowed {tolerance:.0e})"
                )
            worst = max(worst, error)
    return worst


@contextlib.contextmanager
def _onnx_linears(model: nn.Module) -> Iterator[None]:
    """Put ONNX forms in the place of quantized linears, and the originals back afterwards."""
    found: Sequence[tuple[str, nn.Module]] = [
        (path, m) for path, m in model.named_modules() if isinstance(m, (QuantLinear, RotatedLinear))
    ]
    try:
        for path, module in found:
            if isinstance(module, QuantLinear):
                model.set_submodule(path, OnnxLinear(module))
            else:
                model.set_submodule(path, nn.Sequential(Hadamard(module.signs), module.inner))
        yield
    finally:
        for path, module in found:
            model.set_submodule(path, module)


@contextlib.contextmanager
def _numbers(module: nn.Module) -> Iterator[None]:
    """The module with its codes turned into numbers once, not in each call: where only weights are quantized."""
    found = [
        (path, m)
        for path, m in module.named_modules()
        if isinstance(m, QuantLinear) and m.act is None and m.signs is None and not m.factors(torch.float32)
    ]
    try:
        for path, source in found:
            linear = nn.Linear(source.in_features, source.out_features, source.bias is not None, device="meta")
            linear.weight = nn.Parameter(source.weight, requires_grad=False)
            if source.bias is not None:
                linear.bias = nn.Parameter(source.bias.float(), requires_grad=False)
            module.set_submodule(path, linear)
        yield
    finally:
        for path, source in found:
            module.set_submodule(path, source)


@contextlib.contextmanager
def _holding(module: nn.Module, shared: list[Shared]) -> Iterator[None]:
    """The module with the tables of its embeddings as the file has them: rounded."""
    tables = [(module.get_parameter(table.name), table.numbers) for table in shared]
    before = [parameter.data for parameter, _ in tables]
    try:
        for parameter, numbers in tables:
            parameter.data = numbers
        yield
    finally:
        for (parameter, _), data in zip(tables, before, strict=True):
            parameter.data = data


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
