"""Every GGUF preset, loaded and run by the real llama.cpp on a CPU.

    python tests/external/run_llama.py [--folder .node-llama] [--only TEXT] [--commit]

The npm package node-llama-cpp brings llama.cpp built for Linux, macOS and Windows; it is installed into a folder of its
own, where it is missing. SmolLM2 is quantized with every preset and written after its own GGUF file; llama.cpp's
probabilities after each token of a text are compared with those of our own model, by the mean KL divergence. llama.cpp
rounds activations to 8 bits in its products (in blocks of 32, beside Q4_K of 256), so they are close and not equal.
What that alone does is measured in our model, and the bar of a preset is twice that, or 5e-3 if that is more. --commit
writes benches/results/llama.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import qcompile
from qcompile.calibration.text import batches
from qcompile.generation.embedded_models import embedded
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.modules.quant_linear import QuantLinear
from qcompile.pipeline.presets import PRESETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benches" / "results" / "llama.json"
PACKAGE = "node-llama-cpp@3.22.1"
BAR = 5e-3  # the mean KL divergence to our logits
TEXT = "The capital of France is Paris. It is known for the Eiffel Tower, its museums and its cafes along the river."


def install(folder: Path) -> None:
    """Install the package into a folder, where it is missing; no script of any package runs."""
    if (folder / "node_modules" / "node-llama-cpp").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), PACKAGE], check=True
    )


def llama_probabilities(folder: Path, path: Path, ids: list[int], vocabulary: int) -> Tensor:
    """Float64 [S, V] by llama.cpp. Raises RuntimeError with its last words."""
    ids_file, out = path.with_name("ids.json"), path.with_name("out.json")
    ids_file.write_text(json.dumps(ids))
    script = str(Path(__file__).with_name("llama_logits.mjs"))
    command = ["node", script, str(path), str(ids_file), str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode or not out.is_file():
        raise RuntimeError((done.stderr or done.stdout)[-3000:])
    found = torch.zeros(len(ids), vocabulary, dtype=torch.float64)
    for row, entries in zip(found, json.loads(out.read_text()), strict=True):
        if len(entries) != vocabulary:
            raise RuntimeError(
                f"llama.cpp gave probabilities of {len(entries)} tokens, the vocabulary has {vocabulary}"
            )
        tokens, values = zip(*entries, strict=True)
        row[torch.tensor(tokens)] = torch.tensor(values, dtype=torch.float64)
    return found / found.sum(-1, keepdim=True)  # they are of float32, and their sum is not one


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) of log probabilities [S, V]."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def rounded_activations(model: Any, ids: Tensor) -> Tensor:
    """Log probabilities of a model whose linears read activations of 8 bits, in the blocks of llama.cpp."""

    def hook(module: QuantLinear, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        blocks = torch.unflatten(arguments[0], -1, (-1, 256 if module.format.k6 else 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        return (((blocks / scale).round() * scale).flatten(-2), *arguments[1:])

    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    handles = [module.register_forward_pre_hook(hook) for module in linears]
    try:
        with torch.no_grad():
            found: Tensor = model(ids).logits[0].double().log_softmax(-1)
        return found
    finally:
        for handle in handles:
            handle.remove()


def measure(preset: str, folder: Path, model: Any, tokenizer: Any) -> dict[str, float]:
    """KL divergence from our model to llama.cpp and to rounded activations, equal top-1, and the size of the file."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    quantized = copy.deepcopy(model)
    data = batches(tokenizer, length=128, count=4) if PRESETS[preset].needs else None
    qcompile.quantize(quantized, preset, data, progress=False)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.gguf"
        qcompile.export(quantized, path, to="llama.cpp", template=embedded(), progress=False)
        with torch.no_grad():
            expected = quantized(ids).logits[0].double().log_softmax(-1)
        found = llama_probabilities(folder, path, ids[0].tolist(), expected.shape[-1])
        same = (expected.argmax(-1) == found.argmax(-1)).double().mean()
        return {
            "mb": path.stat().st_size / 1e6,
            "kl": divergence(expected, found.clamp_min(1e-30).log()),
            "kl_of_rounding": divergence(expected, rounded_activations(quantized, ids)),
            "same_top1": float(same),
        }


def main() -> None:
    """Measure, print and fail where a file does not load or is beyond the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".node-llama")
    parser.add_argument("--only", default="")
    parser.add_argument("--commit", action="store_true")
    chosen = parser.parse_args()
    console, rows = Console(), {}
    install(chosen.folder)
    manifest = chosen.folder / "node_modules" / "node-llama-cpp" / "package.json"
    version = json.loads(manifest.read_text())["version"]
    model, tokenizer = load_pretrained()
    failed: list[str] = []
    for preset in (name for name in PRESETS if name.startswith("gguf-") and chosen.only in name):
        with console.status(preset):
            try:
                rows[preset] = measure(preset, chosen.folder, model, tokenizer)
            except RuntimeError as error:
                failed.append(preset)
                console.print(f"{preset}: {error}", markup=False)
    columns = "preset", "MB", "mean KL to ours", "of 8-bit activations alone", "same top-1"
    table = Table(*columns, title=f"node-llama-cpp {version}")
    for name, row in rows.items():
        alone, bar = row["kl_of_rounding"], max(BAR, 2 * row["kl_of_rounding"])
        table.add_row(name, f"{row['mb']:.0f}", f"{row['kl']:.1e}", f"{alone:.1e}", f"{row['same_top1']:.1%}")
        if row["kl"] > bar:
            failed.append(f"{name} (KL {row['kl']:.1e}, bar {bar:.1e})")
    console.print(table)
    if chosen.commit:
        data = {"versions": {**versions(), "node-llama-cpp": version}, "rows": rows}
        RESULTS.write_text(json.dumps(data, indent=1) + os.linesep)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
