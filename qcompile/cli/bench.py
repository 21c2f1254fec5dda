"""The command that measures speed: bench."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qcompile.cli.arguments import Dtype, Model, app, is_exported, load
from qcompile.cli.output import print_table


@app.command()
def bench(
    model: Model = "embedded",
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", help="repeat for several")] = None,
    prompt: Annotated[int, typer.Option(help="tokens of the prompt")] = 512,
    tokens: Annotated[int, typer.Option(help="tokens to decode")] = 16,
    rounds: Annotated[int, typer.Option(help="counted rounds; medians are shown")] = 5,
    dtype: Dtype = "bfloat16",
    against: Annotated[list[str] | None, typer.Option(help="another ONNX folder; repeat for several")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measure prefill and decode speed against torch.compile (Inductor) of the float model, interleaved.

    Of an exported ONNX folder: its own speed, beside that of other folders (--against).
    """
    from qcompile.evaluation.throughput import compare_with_inductor

    if is_exported(model):
        if recipe:
            raise ValueError(f"--recipe is for a PyTorch model, and {model} is exported. Fix: name folders, --against")
        _bench_folders([model, *(against or [])], prompt, tokens, rounds, out)
        return
    if against:
        raise ValueError(f"--against is for ONNX folders, and {model} is none. Fix: export it (qcompile export-onnx)")
    loaded, _ = load(model, dtype)
    result = compare_with_inductor(loaded, recipe or ["int8", "w4a8"], prompt=prompt, new=tokens, rounds=rounds)
    print_table(result.table())
    if out is not None:
        result.write(out)


def _bench_folders(folders: list[str], prompt: int, tokens: int, rounds: int, out: Path | None) -> None:
    from qcompile.evaluation.onnx_throughput import speeds
    from qcompile.generation.onnx_session import Session
    from qcompile.memory.environment import versions

    found = speeds({f: Session(f) for f in folders}, prompt=prompt, new=tokens, rounds=rounds)
    table = Table("folder", f"prefill {prompt}, tok/s", "decode, tok/s")
    for name, speed in found.items():
        table.add_row(name, f"{speed.prefill:.0f}", f"{speed.decode:.1f}")
    print_table(table)
    if out is not None:
        rows = {name: dataclasses.asdict(speed) for name, speed in found.items()}
        out.write_text(json.dumps({"versions": versions(), "prompt": prompt, "rows": rows}, indent=1) + "\n")
