"""The command that measures speed: bench."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from qcompile.calibration.context_length import context_length
from qcompile.cli.arguments import (
    Dtype,
    Model,
    app,
    check_recipes,
    is_exported,
    is_packaged,
    load,
    not_empty_list,
    open_package,
)
from qcompile.cli.output import note, print_table
from qcompile.cli.path_checks import output_file
from qcompile.memory.atomic_file import write_whole


@app.command()
def bench(
    model: Model = "embedded",
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="repeat for several", callback=not_empty_list)
    ] = None,
    prompt: Annotated[int, typer.Option(help="tokens of the prompt", min=1, max=100_000_000)] = 512,
    tokens: Annotated[int, typer.Option(help="tokens to decode", min=1, max=1_000_000)] = 16,
    rounds: Annotated[int, typer.Option(help="counted rounds; medians are shown", min=1, max=1_000_000)] = 5,
    dtype: Dtype = "bfloat16",
    against: Annotated[
        list[str] | None,
        typer.Option(help="another ONNX folder or package; repeat for several", callback=not_empty_list),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write", parser=output_file, metavar="FILE")] = None,
) -> None:
    """Measure prefill and decode speed against torch.compile (Inductor) of the float model, interleaved.

    Of an exported ONNX folder or a package: its own speed, beside that of others of its kind (--against).
    """
    from qcompile.evaluation.throughput import compare_with_inductor

    if is_exported(model) or is_packaged(model):
        if recipe:
            raise ValueError(f"--recipe is for a PyTorch model, and {model} is exported. Fix: name others, --against")
        measure = _bench_packages if is_packaged(model) else _bench_folders
        measure([model, *(against or [])], prompt, tokens, rounds, out)
        return
    if against:
        raise ValueError(
            f"--against is for ONNX folders and packages, and {model} is none. Fix: export it (qcompile export-onnx)"
        )
    recipes = recipe or ["int8", "w4a8"]
    check_recipes(*recipes)
    loaded, tokenizer = load(model, dtype)
    prompt = _cap_prompt(prompt, tokens, loaded, tokenizer)
    result = compare_with_inductor(loaded, recipes, prompt=prompt, new=tokens, rounds=rounds)
    print_table(result.table())
    if out is not None:
        result.write(out)


def _bench_folders(folders: list[str], prompt: int, tokens: int, rounds: int, out: Path | None) -> None:
    from qcompile.evaluation.onnx_throughput import speeds
    from qcompile.generation.onnx_session import Session

    for folder in folders:
        if not is_exported(folder):
            raise ValueError(f"--against {folder} holds no model.onnx. Fix: write it with qcompile export-onnx")
    sessions = {f: Session(f) for f in folders}
    for session in sessions.values():
        prompt = _cap_prompt(prompt, tokens, session, None)
    found = speeds(sessions, prompt=prompt, new=tokens, rounds=rounds)
    _show({name: dataclasses.asdict(speed) for name, speed in found.items()}, "folder", prompt, out)


def _bench_packages(files: list[str], prompt: int, tokens: int, rounds: int, out: Path | None) -> None:
    from qcompile.evaluation.throughput import time_models

    for file in files:
        if not is_packaged(file):
            raise ValueError(f"--against {file} is no package. Fix: write it with qcompile package")
    models = {file: open_package(file) for file in files}
    for model, tokenizer in models.values():
        prompt = _cap_prompt(prompt, tokens, model, tokenizer)
    size = min(model.config.vocab_size for model, _ in models.values())
    ids = torch.randint(0, size, (1, prompt), generator=torch.Generator().manual_seed(0))
    found = time_models({file: model for file, (model, _) in models.items()}, ids, new=tokens, rounds=rounds)
    rows = {file: {"prefill": speed.prefill_rate, "decode": speed.decode_rate} for file, speed in found.items()}
    _show(rows, "package", prompt, out)


def _show(rows: dict[str, dict[str, float]], what: str, prompt: int, out: Path | None) -> None:
    """Print tokens per second, and write them."""
    from qcompile.memory.environment import versions

    table = Table(what, f"prefill {prompt}, tok/s", "decode, tok/s")
    for name, row in rows.items():
        table.add_row(Text(name), f"{row['prefill']:.0f}", f"{row['decode']:.1f}")
    print_table(table)
    if out is not None:
        write_whole(out, json.dumps({"versions": versions(), "prompt": prompt, "rows": rows}, indent=1) + "\n")


def _cap_prompt(prompt: int, tokens: int, model: Any, tokenizer: Any) -> int:
    """A prompt that leaves room for the tokens behind it in the context of the model."""
    limit = context_length(model, tokenizer)
    if limit is not None and tokens >= limit:
        raise ValueError(f"--tokens {tokens}: the context of the model ends at {limit}. Fix: decode fewer")
    if limit is None or prompt + tokens <= limit:
        return prompt
    note(f"a prompt of {limit - tokens} tokens, not {prompt}: the context of the model ends at {limit}")
    return limit - tokens
