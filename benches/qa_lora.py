"""QA-LoRA on the embedded LLM: held-out loss before and after the merge, beside LoRA that is merged and rounded again.

    python benches/qa_lora.py [--steps 40] [--seeds 1]      writes benches/results/qa_lora.json

Texts are windows of 64 tokens of the embedded prose, 50 to train on and 32 held out; batches of 4. Both adapters start
from the same 4-bit weights (groups of 128, round to nearest with the clip of least squared error). LoRA trains beside
their dequantized values; its merged weights are quantized again, to nearest and by GPTQ on the training texts.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import qcompile
from qcompile import Format, QuantLinear, Recipe
from qcompile.calibration.text import embedded_text
from qcompile.cli.output import print_table
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.passes import GPTQ, Fuse, Quantize

HERE = Path(__file__).parent
FORMAT = Format.parse("int4/group128/zero")
NEAREST = Recipe("w4a16", (Quantize(FORMAT, None, clip=True), Fuse()))
SEQUENTIAL = Recipe("w4a16-gptq", (GPTQ(FORMAT, None, clip=True), Fuse()))


def texts(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Windows of 64 tokens to train on [50, 64], and held out [32, 64]."""
    ids = tokenizer(embedded_text(), return_tensors="pt").input_ids[0]
    starts = torch.randperm(len(ids) // 64 - 1, generator=torch.Generator().manual_seed(0))[:82] * 64
    windows = torch.stack([ids[start : start + 64] for start in starts])
    return windows[:50], windows[50:]


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Nats per token."""
    model.eval()
    return sum(float(model(input_ids=b, labels=b).loss) * len(b) for b in ids.split(8)) / len(ids)


def fit(model: nn.Module, ids: Tensor, steps: int, lr: float, seed: int, title: str) -> nn.Module:
    """AdamW without decay, gradients clipped to 0.3, five steps of warm-up."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed + 1)
    model.train()
    for step in track(range(steps), title):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 5)
        batch = ids[torch.randint(0, len(ids), (4,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
    return model.eval()


def dequantized(model: nn.Module, like: nn.Module) -> nn.Module:
    """A float model with the values of a quantized one."""
    found = copy.deepcopy(like)
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            with torch.no_grad():
                found.get_submodule(path).weight = nn.Parameter(torch.Tensor(module.weight))
    return found


def qa_lora(base: nn.Module, train: Tensor, test: Tensor, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train, merge, compare."""
    model = copy.deepcopy(base)
    report = qcompile.qa_lora(model, rank=16, alpha=32, seed=seed)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fit(model, train, steps, lr, seed, f"QA-LoRA, lr {lr}")
    with torch.no_grad():
        tuned, before = loss(model, test), model(input_ids=test[:4]).logits
        qcompile.settle(model)
        after = model(input_ids=test[:4]).logits
    return {
        "method": "QA-LoRA", "lr": lr, "seed": seed, "parameters": count, "sites": len(report.passes[0].done),
        "tuned": tuned, "merged": loss(model, test), "logit_change": float((after - before).abs().max()),
        "largest_logit": float(before.abs().max()),
        "same_argmax": float((after.argmax(-1) == before.argmax(-1)).float().mean()),
    }  # fmt: skip


def lora(
    base: nn.Module, like: nn.Module, train: Tensor, test: Tensor, steps: int, lr: float, seed: int
) -> list[dict[str, Any]]:
    """Train, merge into float weights, quantize again, compare."""
    torch.manual_seed(seed)
    names = [path for path, module in base.named_modules() if isinstance(module, QuantLinear)]
    names = [path for path in names if base.get_submodule(path).format == FORMAT]
    model = get_peft_model(dequantized(base, like), LoraConfig(r=16, lora_alpha=32, target_modules=names))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fit(model, train, steps, lr, seed, f"LoRA, lr {lr}")
    with torch.no_grad():
        tuned, before = loss(model, test), model(input_ids=test[:4]).logits
    merged = model.merge_and_unload().requires_grad_(False)
    rows = []
    for recipe in (NEAREST, SEQUENTIAL):
        again = copy.deepcopy(merged)
        batches = [{"input_ids": b} for b in train.split(10)] if recipe.needs else None
        qcompile.quantize(again, recipe, batches, progress=False)
        with torch.no_grad():
            after = again(input_ids=test[:4]).logits
        rows.append({
            "method": f"LoRA, merged, then {recipe.name}", "lr": lr, "seed": seed, "parameters": count,
            "sites": len(names),
            "tuned": tuned, "merged": loss(again, test), "logit_change": float((after - before).abs().max()),
            "largest_logit": float(before.abs().max()),
            "same_argmax": float((after.argmax(-1) == before.argmax(-1)).float().mean()),
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    model, tokenizer = load_pretrained()
    train, test = texts(tokenizer)
    base = copy.deepcopy(model)
    qcompile.quantize(base, NEAREST, progress=False)
    result: dict[str, Any] = {
        "versions": versions(), "steps": args.steps, "format": str(FORMAT),
        "float": loss(model, test), "base": loss(base, test), "rows": [],
    }  # fmt: skip
    table = Table("method", "lr", "parameters", "held-out loss", "after the merge", "logit change", "same top-1")
    table.add_row("float model", "", "", f"{result['float']:.3f}", "", "", "")
    table.add_row(f"{FORMAT}, round to nearest", "", "", f"{result['base']:.3f}", "", "", "")
    for seed in range(args.seeds):
        for lr in (1e-3, 3e-3):
            result["rows"].append(qa_lora(base, train, test, args.steps, lr, seed))
        for lr in (1e-4, 3e-4, 1e-3):
            result["rows"] += lora(base, model, train, test, args.steps, lr, seed)
    for row in result["rows"]:
        table.add_row(
            row["method"], f"{row['lr']:g}", f"{row['parameters'] / 1e6:.2f} M", f"{row['tuned']:.3f}",
            f"{row['merged']:.3f}", f"{row['logit_change']:.1e}", f"{row['same_argmax']:.0%}",
        )  # fmt: skip
    print_table(table)
    (HERE / "results" / "qa_lora.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
