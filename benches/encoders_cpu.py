"""Encoders and an MLP on a CPU: int8 by the backend "qcompile" against Inductor's float and torchao's int8.

    python benches/encoders_cpu.py                   prints the table
    python benches/encoders_cpu.py --commit          also writes benches/results/encoders_cpu-PROCESSOR.json
    python benches/encoders_cpu.py --only bert --rounds 3

Models are made from transformers' configs, with random weights: no download. Every candidate compiles first; then all
run interleaved, and medians are compared. "x float": time of the faster of Inductor's two floats over the candidate's;
below 1 the candidate loses, and the last line names those. torchao's int8 (dynamic activations) runs where it is
installed. Limits: bytes that torch.sum reads, multiply-adds of `_int_mm`, of a bfloat16 and of a float32 matmul.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import torch
from cpu_linear import limits
from rich.console import Console
from rich.table import Table

from qcompile.backend import dynamo as backend
from qcompile.evaluation.throughput import allow_recompiles
from qcompile.memory.environment import versions
from qcompile.numerics.int8_matmul import processor

RESULTS = Path(__file__).parent / "results"
DTYPES = (torch.float32, torch.bfloat16)

Call = Callable[[], object]
Inputs = Callable[[int, torch.dtype], tuple[torch.Tensor, ...]]


def bert() -> torch.nn.Module:
    """Hidden 768, 12 heads of 64, six layers."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(num_hidden_layers=6))


def vit() -> torch.nn.Module:
    """Hidden 768, 12 heads of 64, 197 positions, six layers."""
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(num_hidden_layers=6))


def swin() -> torch.nn.Module:
    """Windows of 49 positions, heads of 32, 96 to 768 channels, 2 + 2 + 6 + 2 layers."""
    from transformers import SwinConfig, SwinModel

    return SwinModel(SwinConfig())


def mlp() -> torch.nn.Module:
    """Norm, 2048 to 8192, GELU, back, and a residual, four times over."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.wide, self.narrow = (
                torch.nn.LayerNorm(2048),
                torch.nn.Linear(2048, 8192),
                torch.nn.Linear(8192, 2048),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.narrow(torch.nn.functional.gelu(self.wide(self.norm(x))))

    return torch.nn.Sequential(*(Block() for _ in range(4)))


def texts(batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Token ids [batch, 128], the same for every dtype."""
    return (torch.randint(0, 30000, (batch, 128)),)


def images(batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Pixels [batch, 3, 224, 224]."""
    return (torch.randn(batch, 3, 224, 224).to(dtype),)


def rows(batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows [batch, 2048]."""
    return (torch.randn(batch, 2048).to(dtype),)


CASES: dict[str, tuple[Callable[[], torch.nn.Module], Inputs, tuple[int, ...]]] = {
    "BERT-base, 6 layers, 128 tokens": (bert, texts, (8,)),
    "ViT-B, 6 layers": (vit, images, (8, 32)),
    "Swin-T": (swin, images, (1, 8)),
    "MLP 2048, 4 blocks": (mlp, rows, (1, 8, 32)),
}


def float_limits() -> dict[str, float]:
    """GMAC/s of float matmuls at 1024 x 1024 x 1024."""
    found = {}
    for dtype in DTYPES:
        square, took = torch.ones(1024, 1024, dtype=dtype), []
        for _ in range(12):
            start = time.perf_counter()
            square @ square
            took.append(time.perf_counter() - start)
        found[f"{str(dtype).removeprefix('torch.')}_mm_GMACs"] = 1024**3 / min(took) / 1e9
    return found


def candidates(
    make: Callable[[], torch.nn.Module], inputs: dict[torch.dtype, tuple[torch.Tensor, ...]]
) -> dict[str, Call]:
    """Name -> a compiled call."""
    torch.manual_seed(0)
    model, found = make().eval().requires_grad_(False), dict[str, Call]()

    def bound(compiled: Callable[..., object], x: tuple[torch.Tensor, ...]) -> Call:
        return lambda: compiled(*x)

    for dtype, x in inputs.items():
        name = str(dtype).removeprefix("torch.")
        mine = copy.deepcopy(model).to(dtype)
        found[f"inductor {name}"] = bound(torch.compile(mine, dynamic=False), x)
        found[f"qcompile int8 {name}"] = bound(torch.compile(copy.deepcopy(mine), backend="qcompile", dynamic=False), x)
        if util.find_spec("torchao"):
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            other = copy.deepcopy(mine)
            quantize_(other, Int8DynamicActivationInt8WeightConfig())
            found[f"torchao int8 {name}"] = bound(torch.compile(other, dynamic=False), x)
    return found


def compile_all(calls: dict[str, Call]) -> dict[str, tuple[int, int]]:
    """Call each once, which compiles it; gives how many sites are int8, and how many there are."""
    found = {}
    with torch.no_grad():
        for name, call in calls.items():
            backend.reports.clear()
            call()
            every = [site for report in backend.reports for site in report.sites]
            found[name] = sum(not site.reason for site in every), len(every)
    return found


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; the first two calls of each warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for run in range(rounds + 2):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if run >= 2:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(took) * 1e3 for name, took in times.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this, whatever its case")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--commit", action="store_true")
    options = parser.parse_args()
    chosen = {name: case for name, case in CASES.items() if options.only.lower() in name.lower()}
    if not chosen or options.rounds < 1:
        parser.error(f"--only {options.only!r} and --rounds {options.rounds}: one of {list(CASES)}, at least one round")
    if options.commit and options.only:
        parser.error("--commit writes all cases: drop --only")
    allow_recompiles()
    machine, found = limits() | float_limits(), list[dict[str, Any]]()
    table = Table("case", "batch", "candidate", "ms", "x float", "sites int8")
    losses = []
    for title, (make, inputs, batches) in chosen.items():
        for batch in batches:
            torch._dynamo.reset()
            torch.manual_seed(1)
            calls = candidates(make, {dtype: inputs(batch, dtype) for dtype in DTYPES})
            sites = compile_all(calls)
            ms = interleaved(calls, options.rounds)
            best = min(took for name, took in ms.items() if name.startswith("inductor"))
            for name, took in ms.items():
                done, every = sites[name]
                found.append(
                    dict(
                        case=title,
                        batch=batch,
                        candidate=name,
                        ms=took,
                        x_float=best / took,
                        int8_sites=done,
                        sites=every,
                    )
                )
                table.add_row(
                    title, str(batch), name, f"{took:.2f}", f"{best / took:.2f}", f"{done} of {every}" if every else ""
                )
                if every and took > best:
                    losses.append(f"{title}, batch {batch}: {name}")
    Console(width=130).print(table)
    print(", ".join(f"{name} {value:.0f}" for name, value in machine.items()))
    print(f"slower than Inductor's faster float: {losses or 'none'}")
    if not util.find_spec("torchao"):
        print("torchao is not installed: its int8 was not measured")
    if options.commit:
        made = {
            "versions": versions(),
            "limits": machine,
            "rounds": options.rounds,
            "rows": found,
            "torchao": bool(util.find_spec("torchao")),
        }
        (RESULTS / f"encoders_cpu-{processor()}.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
