"""Folders of tiny float models, and runs over them: in memory, streamed, resumed.

    python tests/streamed_models.py SOURCE OUT RECIPE [resume] [fails]

is a streamed run in a process of its own, which torchrun may start too; with `fails` its last rank raises.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from word_tokenizer import word_tokenizer

import qcompile
from qcompile.api.quantize_folder import quantize_folder
from qcompile.checkpoint.stored_files import stored_tensors
from qcompile.checkpoint.stored_gguf import stored_gguf
from qcompile.generation import pretrained
from qcompile.memory import spilled_weights
from qcompile.passes.weights import sequential
from qcompile.recipe.recipe import Recipe

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64}
LOG = "quantize.jsonl"


def llama_folder(folder: Path, *, shard: str = "40KB", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A decoder of two layers in several files, with a tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).to(dtype)
    return _saved(model, folder, shard)


def mixture_folder(folder: Path) -> Path:
    """A mixture of four experts, each with tensors of its own in the files; the model has stacks of them."""
    torch.manual_seed(0)
    config = MixtralConfig(**{**SIZES, "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2})
    return _saved(MixtralForCausalLM(config), folder, "40KB")


def _saved(model: Any, folder: Path, shard: str) -> Path:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)  # at 0.02 the residual stream is the embedding, and every layer's part is lost
    model.save_pretrained(folder, max_shard_size=shard)
    text = folder / "words"
    text.mkdir()
    (text / "words.jsonl").write_text(" ".join(f"w{index}" for index in range(50)))
    word_tokenizer(text).save_pretrained(folder)
    shutil.rmtree(text)
    return folder


def token_batches(count: int = 3, length: int = 24, rows: int = 1) -> list[torch.Tensor]:
    """Token ids [rows, length]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (rows, length), generator=generator) for _ in range(count)]


def whole_blocks() -> list[torch.Tensor]:
    """Batches that are each a block of tokens of its own, so that ranks sum the products of one process."""
    return token_batches(4, 32, 8)


def store_all(monkeypatch: Any) -> None:
    """No tensor is too small to stay in its file."""
    monkeypatch.setattr(pretrained, "stored_tensors", functools.partial(stored_tensors, small=0))
    monkeypatch.setattr(pretrained, "stored_gguf", functools.partial(stored_gguf, small=0))
    monkeypatch.setattr(spilled_weights, "SMALL", 0)


def streamed(source: Path, out: Path, recipe: str | Recipe, batches: Any = None, **options: Any) -> dict[str, bytes]:
    """Quantize a folder to a folder; the content of the files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random logits agree with nothing
        quantize_folder(source, out, recipe, batches, progress=False, **options)
    return content(out)


def in_memory(
    source: Path, out: Path, recipe: str | Recipe, batches: Any = None, dtype: torch.dtype | None = None
) -> dict[str, bytes]:
    """The same of a model that is loaded whole."""
    model, tokenizer = pretrained.load_pretrained(str(source), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qcompile.quantize(model, recipe, batches, progress=False)
        qcompile.save(model, out, tokenizer)
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the log, which has times."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != LOG
    }


def finished_sites(out: Path) -> list[Path]:
    """The files of sites that an unfinished run keeps."""
    return sorted(out.with_name(f"{out.name}.unfinished").glob("sites/*.safetensors"))


def log_lines(out: Path) -> list[dict[str, Any]]:
    """What the log of a finished run says."""
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def main(source: str, out: str, recipe: str, *flags: str) -> None:
    """A streamed run."""
    store_all(pytest.MonkeyPatch())
    if "fails" in flags and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:

        def broken(*_: Any) -> Any:
            raise ValueError("this rank is broken")

        sequential.hessian_of = broken  # type: ignore[assignment]
    streamed(Path(source), Path(out), recipe, whole_blocks(), resume="resume" in flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
