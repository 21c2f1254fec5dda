"""GGUF files of our codes against files of the same types that are rounded to nearest.

    python benches/gguf_perplexity.py [TEXT [CALIBRATION_TEXT]] [--windows 4] [--batches 16] [--only NAME] [--commit]

--commit writes benches/results/gguf_perplexity.json. SmolLM2-135M, as a randomly rotated copy: the embedded file has 4
bits itself, and rounding to its own grid is nearly free. Each file is read by transformers, which dequantizes it, and
judged in windows of 2048 tokens of TEXT; calibration reads batches of 512.

    ours         the presets gguf-*: GPTQ on searched scales
    nearest      tensor by tensor the same types, by gguf.quants.quantize; of Q4_K, which that package does not
                 quantize, our grid to nearest, without search and GPTQ

Both files have the same metadata, the same float tensors and the same size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from rich.table import Table
from torch import Tensor

import qcompile
from qcompile.calibration.text import batches, read_text, windows
from qcompile.checkpoint.writers.gguf_blocks import blocks_of
from qcompile.checkpoint.writers.gguf_template import GgufTemplate
from qcompile.cli.output import print_table, tell
from qcompile.evaluation.compare import rotated_copy
from qcompile.evaluation.perplexity import perplexity
from qcompile.generation.embedded_models import embedded
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor

OUT = Path(__file__).parent / "results" / "gguf_perplexity.json"
PRESETS = ("gguf-q4_0", "gguf-q4_1", "gguf-q4_k")
BAR = 0.10  # of the perplexity that quantizing adds
_FLOATS = ("F32", "F16", "BF16")


def copied_writer(reader: Any, path: Path) -> Any:
    """A writer with the metadata of a file."""
    writer = gguf.GGUFWriter(str(path), str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    return writer


def finish(writer: Any) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_float(model: Any, template: GgufTemplate, path: Path) -> None:
    """A model as a float32 file, in the order of rows of a template; vectors too."""
    writer = copied_writer(template.reader, path)
    table = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    for name, parameter in model.named_parameters():
        place = template.place_of(name, table)
        writer.add_tensor(place.name, (place.arranged(parameter.detach().float()) + place.offset).contiguous().numpy())
    finish(writer)


def write_nearest(ours: Path, floats: Path, path: Path) -> None:
    """The tensors of a float file, each rounded to nearest to the type that it has in another file."""
    reader = gguf.GGUFReader(str(ours))
    values = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(str(floats)).tensors}
    writer = copied_writer(reader, path)
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if kind.name in _FLOATS:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=kind)
        elif kind.name == "Q4_K":
            writer.add_tensor(tensor.name, nearest_k(torch.from_numpy(values[tensor.name])), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values[tensor.name], kind), raw_dtype=kind)
    finish(writer)


def nearest_k(weight: Tensor) -> np.ndarray:
    """Blocks of Q4_K whose scales cover each range."""
    form = Format.parse("int4/group32/k6")
    parts = dict(zip(PARTS, quantize_tensor(weight, form).stored_parts, strict=True))
    _, blocks = blocks_of("nearest", QuantLinear(weight.shape[1], weight.shape[0], form, None, parts))
    return blocks.numpy()


def measured(path: Path, pieces: list[Tensor]) -> float:
    """Perplexity of a file as transformers reads it."""
    model, _ = load_pretrained(str(path))
    return perplexity(model, pieces, label=path.stem)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?")
    parser.add_argument("calibration", nargs="?")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--only", default="", help="presets whose name contains this")
    parser.add_argument("--commit", action="store_true")
    asked = parser.parse_args()
    model, tokenizer = load_pretrained()
    pieces = windows(tokenizer, read_text(asked.text), count=asked.windows)
    data = batches(tokenizer, asked.calibration, count=asked.batches)
    copied = rotated_copy(model)
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "float.gguf"
        write_float(copied, GgufTemplate(embedded()), floats)
        base, rows = measured(floats, pieces), []
        for preset in (name for name in PRESETS if asked.only in name):
            ours, nearest = (Path(folder) / f"{preset}-{kind}.gguf" for kind in ("ours", "nearest"))
            qcompile.export(copied, ours, preset, data, to="gguf", template=floats)
            write_nearest(ours, floats, nearest)
            found = {kind: measured(path, pieces) for kind, path in (("ours", ours), ("nearest", nearest))}
            gain = 1 - (found["ours"] - base) / (found["nearest"] - base)
            rows.append(dict(preset=preset, mb=ours.stat().st_size / 1e6, float=base, **found, gain=gain))
            tell(f"{preset}: {found['nearest']:.2f} to nearest, {found['ours']:.2f} ours, {base:.2f} float")
            ours.unlink(), nearest.unlink()
    table = Table("preset", "MB", "float", "nearest", "ours", "perplexity added: less by")
    for row in rows:
        values = (f"{row[name]:.2f}" for name in ("float", "nearest", "ours"))
        table.add_row(str(row["preset"]), f"{row['mb']:.0f}", *values, f"{row['gain']:.0%}")
    print_table(table)
    if asked.commit:
        source = Path(asked.text).name if asked.text else "the embedded text"
        facts = dict(versions=versions(), text=source, windows=asked.windows, batches=asked.batches)
        OUT.write_text(json.dumps(dict(**facts, rows=rows), indent=1) + "\n")
    slow = [str(row["preset"]) for row in rows if float(row["gain"]) < BAR]
    tell(f"bar of {BAR:.0%}: {'not met by ' + ', '.join(slow) if slow else 'met by all'}")


if __name__ == "__main__":
    main()
