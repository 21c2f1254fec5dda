"""The Python blocks of the documentation run, on models of one layer."""

from __future__ import annotations

import functools

import pytest
import torch
from doc_pages import PAGES, ROOT, blocks
from tiny_text_models import one_layer_llama
from zoo import SIZES, build, example

from qcompile.calibration import text
from qcompile.generation import pretrained

ALGORITHMS = [page for page in PAGES if page.parent.name == "algorithms"]
GUIDES = [page for page in PAGES if page.parent.name == "guides"]
WHOLE = [
    ROOT / "README.md",
    ROOT / "docs" / "getting-started.md",
    *GUIDES,
    *(page for page in PAGES if page.parent.name == "reference"),
]
PREAMBLE = "import qcompile\nfrom qcompile.calibration.text import batches\n"


@pytest.mark.parametrize("page", ALGORITHMS, ids=lambda p: p.stem)
def test_snippets_run(page):
    model = one_layer_llama(SIZES["vocab_size"])
    ids = [torch.randint(3, 128, (1, 24)) for _ in range(2)]
    space = {"model": model, "batches": [{"input_ids": x} for x in ids], "windows": ids}
    assert blocks(page), "an algorithm is shown in a few lines"
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), space)


@pytest.mark.slow
@pytest.mark.parametrize("page", WHOLE, ids=lambda p: p.stem)
def test_pages_run(page, smollm2, tmp_path, monkeypatch):
    """All blocks of a page in order, on a small model and in a folder of their own."""
    tokenizer = smollm2[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *_, **__: (one_layer_llama(len(tokenizer)), tokenizer))
    brief = functools.partial(text.batches, count=2, length=64)
    monkeypatch.setattr(text, "batches", lambda *args, **sizes: brief(*args, **{**sizes, "length": 64}))
    one_layer_llama(len(tokenizer)).save_pretrained("big-model")
    space = {
        "model": one_layer_llama(len(tokenizer)),
        "tokenizer": tokenizer,
        "inputs": tokenizer("The capital of France is", return_tensors="pt"),
        "build_model": lambda: one_layer_llama(len(tokenizer)),
        "weight": torch.randn(8, 256),
        "encoder": build("bert"),
        "sentences": [{**example("bert"), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}],
    }
    for block in blocks(page):
        exec(compile(PREAMBLE + block, str(page), "exec"), space)
        if page in GUIDES and hasattr(space["model"], "qcompile_recipe"):
            space["model"] = one_layer_llama(len(tokenizer))  # a page of alternatives: each starts from a float model
