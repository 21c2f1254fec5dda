"""Export a module that holds quantized linears to an ONNX folder, and prove it by running it.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.codegen.onnx.linear import NoOnnxForm, OnnxLinear, refusal
from qcompile.codegen.onnx.translate import table
from qcompile.module import QuantLinear, RotatedLinear

MODEL = "model.onnx"


class ExportMismatch(ValueError):
    """The exported model does not compute what the module does; the text holds the error."""


def export_module(model: nn.Module, folder: Path, *, example: Any = None, tokenizer: Any = None) -> float:
    """Write model.onnx (+ model.onnx.data) into an existing folder.

    Args:
        model: float32 or castable; left as it is. folder: where to write.
        example: keyword arguments of a module without a cache; None for a causal LM.
        tokenizer: saved beside the model.

    Returns:
        The largest relative difference (of norms) between ONNX Runtime and the module over the checked calls.

    Raises:
        NoOnnxForm: formats without an operator (before any work). ExportMismatch: wrong results.
    """
    check_forms(model)
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        model = copy.deepcopy(model).float()
    model.eval()
    with _onnx_linears(model), torch.no_grad(), _quiet():
        wrapper = _WithCache(model) if example is None else _Plain(model, example)
        exported = torch.export.export(
            wrapper, wrapper.arguments(), dynamic_shapes=wrapper.dynamic_shapes(), strict=False
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=21,
            input_names=wrapper.input_names,
            output_names=wrapper.output_names,
            custom_translation_table=table(),
            optimize=True,
            verbose=False,
        )
        assert program is not None
        _name_dimensions(program.model, wrapper)
        program.save(str(folder / MODEL), external_data=True)
    with torch.no_grad():  # the quantized linears are back: the file is compared with them
        error = _prove(folder / MODEL, wrapper)
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(str(folder))
    return error


def check_forms(model: nn.Module) -> None:
    """Refuse every site without an ONNX form, all at once."""
    bad = {
        path: reason
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear) and (reason := refusal(module)) is not None
    }
    if bad:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in list(bad.items())[:20])
        raise NoOnnxForm(
            f"{len(bad)} sites have no ONNX form:\n{lines}\nUse int8, w8a16, w4a16 or w4a8, or a rule that keeps them."
        )


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

    def checks(self) -> list[tuple[Any, ...]]:
        """Prefill from nothing, for one and two rows, and continuations of the cache that it leaves."""
        found = [self.arguments(1, 7, 0), self.arguments(2, 4, 0)]
        for rows, length in ((1, 1), (2, 3)):
            ids, mask, _ = found[rows - 1]
            cache = self.forward(*found[rows - 1])[1]
            more = self.arguments(rows, length, 0)[0]
            found.append((more, torch.cat([mask, torch.ones_like(more)], dim=1), cache))
        return found

    def flat(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        return [arguments[0], arguments[1], *arguments[2]]


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

    def checks(self) -> list[tuple[Any, ...]]:
        whole = self.arguments()
        return [whole, tuple(v[:1] for v in whole)]

    def flat(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        return list(arguments)


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


def _prove(path: Path, wrapper: Any) -> float:
    """Check the file, open it in ONNX Runtime and compare it with the module."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    rounded = any(isinstance(m, QuantLinear) and m.act is not None for m in wrapper.modules())
    # A value on the edge of a rounding step may fall to either side: one int8 step, not a wrong law.
    tolerance = 5e-2 if rounded else 1e-3
    for arguments in wrapper.checks():
        feeds = {n: t.numpy() for n, t in zip(wrapper.input_names, wrapper.flat(arguments), strict=True)}
        got = session.run(None, feeds)
        want = torch.utils._pytree.tree_leaves(wrapper(*arguments))
        for name, mine, theirs in zip(wrapper.output_names, got, want, strict=True):
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
                from qcompile.codegen.onnx.linear import _Hadamard

                model.set_submodule(path, nn.Sequential(_Hadamard(module.signs), module.inner))
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
