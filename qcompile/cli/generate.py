"""Commands that run a model or an exported folder: generate, chat."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import numpy as np
import typer

from qcompile.calibration.context_length import context_length
from qcompile.cli.arguments import app, flags_of, is_exported, is_packaged, load, not_empty, open_package
from qcompile.cli.output import console, note
from qcompile.generation.sampling_rules import SamplingRules

Runnable = Annotated[
    str, typer.Argument(help="exported ONNX folder, package (.pt2), or any MODEL", metavar="FOLDER", callback=not_empty)
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="compile a PyTorch MODEL first (a minute or two; a float one becomes int8)"),
]


def open_model(name: str, compiled: bool = False) -> tuple[Any, Any, set[int], int | None]:
    """A session of an exported folder or a model of transformers, the tokenizer, the end tokens, and the tokens that
    it reads at once."""
    from qcompile.generation.sampling import end_tokens

    if is_exported(name):
        if compiled:
            raise ValueError(f"--compile is for a PyTorch model, and {name} is exported. Fix: drop it")
        from qcompile.generation.onnx_session import Session, load_tokenizer

        session, tokenizer = Session(name), load_tokenizer(name)
        return session, tokenizer, session.end_tokens | end_tokens(tokenizer), context_length(session, tokenizer)
    if is_packaged(name):
        if compiled:
            raise ValueError(f"--compile is for a PyTorch model, and {name} is compiled. Fix: drop it")
        model, tokenizer = open_package(name)
        return model, tokenizer, end_tokens(tokenizer, model), context_length(model, tokenizer)
    model, tokenizer = load(name)
    if compiled:
        from qcompile.api.compile_for_generate import compile_for_generate

        report = compile_for_generate(model)
        sites = sum(bool(site.kernel) for site in report.sites)
        note(f"a token is one compiled step, {sites} sites quantized" if not report.breaks else report.breaks[-1])
    return model, tokenizer, end_tokens(tokenizer, model), context_length(model, tokenizer)


@app.command()
@flags_of(SamplingRules)
def generate(
    folder: Runnable,
    options: SamplingRules,
    prompt: Annotated[str, typer.Option(help="text to continue", callback=not_empty)],
    tokens: Annotated[int, typer.Option(help="new tokens at most", min=1, max=100_000_000)] = 64,
    compiled: Compile = False,
) -> None:
    """Continue a prompt with an exported ONNX folder (or with a PyTorch MODEL, by its own `generate()`)."""
    from qcompile.generation.sampling import new_tokens, print_answer, readable_text, stream

    model, tokenizer, end, limit = open_model(folder, compiled)
    ids = np.array(tokenizer(prompt)["input_ids"], np.int64)[None]
    if not ids.size:
        raise ValueError("the prompt is empty. Fix: give at least one token")
    new = new_tokens(ids.shape[1], tokens, limit)
    if new < tokens:
        note(f"{new} new tokens at most, not {tokens}: the context of the model ends there")
    sys.stdout.write(prompt)
    if not is_exported(folder):
        print_answer(model, tokenizer, ids, new, options, end)
        return
    for piece in readable_text(tokenizer, stream(model.read, ids, new, rules=options, stop=end)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
@flags_of(SamplingRules)
def chat(
    folder: Runnable,
    options: SamplingRules,
    system: Annotated[str, typer.Option(help="system message, before the first turn")] = "",
    tokens: Annotated[int, typer.Option(help="new tokens at most, per answer", min=1, max=100_000_000)] = 512,
    compiled: Compile = False,
) -> None:
    """Talk with an exported ONNX folder (or with a PyTorch MODEL); an empty line ends it."""
    from qcompile.generation.sampling import Conversation, step_function

    model, tokenizer, end, limit = open_model(folder, compiled)
    step = model.read if is_exported(folder) else step_function(model)
    talk = Conversation(
        step, tokenizer, system=system, max_new_tokens=tokens, rules=options, stop=end, max_length=limit
    )
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
