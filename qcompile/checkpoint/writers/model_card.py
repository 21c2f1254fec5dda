"""The README.md of an exported folder: what was done to the model, how it is loaded, and what loaders do otherwise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.checkpoint.writers.expert_linears import quantized_stacks
from qcompile.checkpoint.writers.export_refusals import quantized_linears
from qcompile.checkpoint.writers.float_tensors import model_dtype, stores_otherwise
from qcompile.checkpoint.writers.kv_cache_scales import stores_cache
from qcompile.recipe.report import Report
from qcompile.version import VERSION

_ENGINES = """\
    vllm serve {folder}
    python -m sglang.launch_server --model-path {folder}
"""
_TRANSFORMERS = """\
```python
import transformers

model = transformers.{name}.from_pretrained("{folder}"{options})
tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")
```
"""
_GGUF = """\
    llama-cli -m {folder}/model.gguf
    llama-server -m {folder}/model.gguf
"""
_PROGRAM = """\
```python
from executorch.runtime import Runtime

forward = Runtime.get().load_program("{folder}/model.pte").load_method("forward")
outputs = forward.execute(inputs)  # a list of tensors; the report below names the inputs
```
"""
_PROGRAMS = {"gguf": _GGUF, "executorch": _PROGRAM}


def write_card(work: Path, folder: Path, model: Any, report: Report, target: str) -> None:
    """Write README.md and qcompile-report.json.

    Args:
        work: where to.
        folder: what the folder will be called.
        model: quantized.
        report: of the run and of the export.
        target: the format.
    """
    notes = caveats(model, target)
    dequantize = any("dequantize=True" in note for note in notes)
    options = ", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)" if dequantize else ""
    lines = _PROGRAMS.get(target, _ENGINES)
    parts = [
        f"---\nlibrary_name: {target if target in _PROGRAMS else 'transformers'}\ntags: [quantized, {target}]\n---\n",
        f"# {folder.name}\n",
        f"{type(model).__name__}, quantized by qcompile {VERSION} (recipe {report.recipe}) and stored as {target}. "
        "The codes and scales in these files are the ones that were chosen; nothing was rounded again.\n",
        "## Weights\n",
        "\n".join(f"- {count} x {formats}" for formats, count in _formats(model).most_common()) + "\n",
        "## Load\n",
        lines.format(folder=folder.name),
    ]
    if target not in _PROGRAMS:
        parts.append(_TRANSFORMERS.format(folder=folder.name, name=_auto_class(model), options=options))
    if notes:
        parts += ["## What to know\n", "\n".join(f"- {note}" for note in notes) + "\n"]
    parts += ["## Report\n", "\n".join(f"    {line}" for line in str(report).splitlines()) + "\n"]
    (work / "README.md").write_text("\n".join(parts), encoding="utf-8")
    report.write(work / "qcompile-report.json")


def caveats(model: nn.Module, target: str) -> list[str]:
    """What a program that reads the folder computes otherwise than qcompile, or cannot do."""
    linears, found = list(quantized_linears(model).values()), list[str]()
    if target != "compressed-tensors":
        return found
    packed = [m for m in linears if not (m.format.is_float or (m.format.bits == 8 and m.act is not None))]
    if any(m.format.zero != "none" for m in packed):
        found.append(
            "Weights have zero points. transformers with compressed-tensors up to 0.20 refuses such files by default "
            "(it expects unpacked zero points) and reads them exactly with dequantize=True, as above. vLLM reads them; "
            "SGLang takes symmetric weights only."
        )
    if any(m.act is not None and not m.act.is_float for m in linears):
        found.append(
            "transformers emulates int8 activations with scales of max / 127.5, where qcompile and vLLM's kernels take "
            "max / 127: weights are equal, logits differ a little."
        )
    if any(m.act is not None and not m.act.is_float for m in packed):
        found.append("Most kernels for packed int4 weights ignore the format of activations and compute W4A16.")
    if any(m.act is not None and m.act.is_float for m in packed):
        found.append("vLLM runs int4 weights with fp8 activations on NVIDIA GPUs of compute capability 9.0 only.")
    if stores_cache(model):
        found.append(
            "vLLM reads the scales of the key/value cache. transformers from 5.24 on with compressed-tensors up to "
            "0.20.1 keeps the cache float."
        )
    if stores_otherwise(model):
        found.append(
            "Tensors are cut and named as in checkpoints of this class (stacks of experts expert by expert). "
            "transformers 5.23 does not read them beside weights of compressed-tensors."
        )
    if model_dtype(model) != torch.float32 and any(m.format.scale == "f32" for m in linears):
        found.append(
            "Scales are float32 in a model of 16 bits. vLLM reads them as they are; transformers rounds them when it "
            "loads. Formats such as int8/row/bf16 avoid that."
        )
    return found


def _formats(model: nn.Module) -> Counter[str]:
    linears = dict.fromkeys(quantized_linears(model).values())
    found = Counter(f"weight {m.format}, activation {m.act or 'float'}" for m in linears)
    return found + Counter(f"stack of experts in {stack.format}" for stack in quantized_stacks(model).values())


def _auto_class(model: Any) -> str:
    return "AutoModelForCausalLM" if model.can_generate() else type(model).__name__
