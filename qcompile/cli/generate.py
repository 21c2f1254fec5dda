"""Commands that run a model or an exported folder: generate, chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from qcompile.cli.arguments import app, console, load

Runnable = Annotated[str, typer.Argument(help="exported ONNX folder, or any MODEL", metavar="FOLDER")]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
Seed = Annotated[int, typer.Option(help="of the sampling")]


def open_model(name: str) -> tuple[Any, Any, set[int]]:
    """What makes logits from ids (qcompile.generation.sampling.Step), the tokenizer, and the tokens that end a text."""
    from qcompile.generation.sampling import ends_of, steps_of

    if (Path(name) / "model.onnx").is_file():
        from qcompile.generation.onnx_session import Session, tokenizer_of

        session, tokenizer = Session(name), tokenizer_of(name)
        return session.read, tokenizer, session.ends | ends_of(tokenizer)
    model, tokenizer = load(name)
    return steps_of(model), tokenizer, ends_of(tokenizer, model)


@app.command()
def generate(
    folder: Runnable,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    tokens: Annotated[int, typer.Option(help="new tokens at most")] = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Continue a prompt with an exported ONNX folder (or with a PyTorch MODEL)."""
    from qcompile.generation.sampling import readable, stream

    step, tokenizer, end = open_model(folder)
    ids = np.array(tokenizer(prompt)["input_ids"], np.int64)[None]
    if not ids.size:
        raise ValueError("the prompt is empty: give at least one token")
    sys.stdout.write(prompt)
    for piece in readable(tokenizer, stream(step, ids, tokens, temperature=temperature, seed=seed, stop=end)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def chat(
    folder: Runnable,
    system: Annotated[str, typer.Option(help="what the model is told before the first turn")] = "",
    tokens: Annotated[int, typer.Option(help="tokens of an answer at most")] = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk with an exported ONNX folder (or with a PyTorch MODEL); an empty line ends it."""
    from qcompile.generation.sampling import Conversation

    step, tokenizer, end = open_model(folder)
    talk = Conversation(step, tokenizer, system=system, new=tokens, temperature=temperature, seed=seed, stop=end)
    while True:
        try:
            said = console.input("[bold]you:[/] ")
        except EOFError:
            return
        if not said.strip():
            return
        for piece in talk.answer(said):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
