"""Writing a GGUF file: the metadata of a template, our codes as blocks, and everything else without rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.checkpoint.writers.compressed_tensors_proof import require_same
from qcompile.checkpoint.writers.export_refusals import ExportError, quantized_linears
from qcompile.checkpoint.writers.gguf_blocks import TARGET, blocks_of
from qcompile.checkpoint.writers.gguf_template import GgufTemplate
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.modules.quant_linear import QuantLinear
from qcompile.recipe.report import PassReport

_FILE_TYPE, _VERSION = "general.file_type", "general.quantization_version"


def write_gguf(model: Any, template: GgufTemplate, path: Path) -> int:
    """Write a file and read it back by the package gguf.

    Args:
        model: of transformers, quantized; the same model as the template's.
        template: names, metadata and order of rows.
        path: the file.

    Returns:
        How many quantized weights were compared. Those of Q8_0, Q4_0 and Q4_K are equal bit for bit; Q4_1 adds its
        offset where qcompile subtracts a zero point, which rounds float32 once more.

    Raises:
        ExportError: a weight that GGUF cannot say, or that reads otherwise than it was written.
    """
    import gguf

    embedding = _embedding_name(model)
    linears = quantized_linears(model)
    template.check(model)
    in_parts = any(isinstance(tensor, StoredTensor) for _, tensor in _tensors(model))
    writer = gguf.GGUFWriter(str(path), template.architecture, use_temp_file=in_parts)
    kinds: dict[str, str] = {}
    try:
        for name, tensor in _tensors(model):
            place = template.place_of(name, embedding)
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight" and owner in linears:
                kind, blocks = blocks_of(owner, linears[owner])
                kinds[owner] = kind
                raw = getattr(gguf.GGMLQuantizationType, kind)
                writer.add_tensor(place.name, place.arranged(blocks).numpy(), raw_dtype=raw)
            else:
                _add_float(writer, place.name, place.arranged(tensor), place.offset)
        for stored in template.reader.tensors:
            if stored.name in template.extra and stored.name not in {t for shard in writer.tensors for t in shard}:
                writer.add_tensor(stored.name, stored.data, raw_dtype=stored.tensor_type)
        common = max(kinds.values(), key=list(kinds.values()).count)
        file_type = "MOSTLY_Q4_K_S" if common == "Q4_K" else f"MOSTLY_{common}"
        _copy_metadata(writer, template, int(getattr(gguf.LlamaFileType, file_type)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return _compare(model, template, path, embedding)


def written_gguf(model: Any, template: GgufTemplate, path: Path) -> PassReport:
    """`write_gguf`, with a report of what was written and compared."""
    count = write_gguf(model, template, path)
    report = PassReport(f"export to {TARGET}", done=list(quantized_linears(model)))
    report.notes.append(f"{count} weights read back by gguf, equal (Q4_1: but for one rounding of float32)")
    return report


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    """All parameters, each once, and the weights and biases of quantized linears."""
    linears, found = quantized_linears(model), list[tuple[str, Tensor]]()
    for name, parameter in model.named_parameters():
        found.append((name, parameter.detach().cpu()))
    for path, linear in linears.items():
        found.append((f"{path}.weight", linear.codes))
        if linear.bias is not None:
            found.append((f"{path}.bias", linear.bias.detach().cpu()))
    return found


def _embedding_name(model: Any) -> str:
    table = model.get_input_embeddings()
    return next(f"{path}.weight" for path, module in model.named_modules() if module is table)


def _add_float(writer: Any, name: str, tensor: Tensor, offset: float) -> None:
    """Vectors as float32, as llama.cpp has them; matrices in the narrowest type that holds all values."""
    import gguf

    wide = tensor.float() + offset if offset else tensor.float()
    if tensor.ndim < 2:
        writer.add_tensor(name, wide.contiguous().numpy())
    elif torch.equal(wide.half().float(), wide):
        writer.add_tensor(name, wide.half().contiguous().numpy())
    elif torch.equal(wide.bfloat16().float(), wide):
        data = wide.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, wide.contiguous().numpy())


def _copy_metadata(writer: Any, template: GgufTemplate, file_type: int) -> None:
    import gguf

    for key, field in template.reader.fields.items():
        if key.startswith(("GGUF.", "split.")) or key in ("general.architecture", _FILE_TYPE, _VERSION):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _compare(model: Any, template: GgufTemplate, path: Path, embedding: str) -> int:
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    linears = quantized_linears(model)
    for owner, linear in linears.items():
        place = template.place_of(f"{owner}.weight", embedding)
        tensor = stored[place.name]
        read = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        ours = place.arranged(linear.weight.cpu())
        if linear.zero is None or linear.format.k6:
            require_same(owner, read, ours, "gguf")
        elif not bool(((read - ours).abs() <= _rounding(linear)).all()):
            raise ExportError(f"{owner}: gguf reads other weights of the written file than the model's")
    return len(linears)


def _rounding(linear: QuantLinear) -> float:
    """Two roundings to float32 of d u and m, which are as large as s 15 and s z."""
    assert linear.zero is not None
    return float(2**-22 * (linear.scale.float().abs().max() * (15 + linear.zero.abs().max())))
