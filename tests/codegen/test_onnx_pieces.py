"""Prompts read in pieces, by onnxruntime-genai and by our own session, and norms that write no more than is read."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.lowering.node_builder import every_node
from qcompile.generation import onnx_session as sessions
from qcompile.generation.onnx_session import Session
from qcompile.generation.sampling import stream
from qcompile.recipe.rule import RecipeError

PROMPT = np.random.default_rng(0).integers(3, 128, (1, 45))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A W4A8 decoder: both ways to multiply, prompts in pieces of 16."""
    place = tmp_path_factory.mktemp("pieces") / "m"
    qcompile.export_onnx(build("llama"), place, "int4-cpu", [example("llama")], chunk=16, progress=False)
    return place


def test_genai_reads_in_pieces_what_it_reads_at_once(folder):
    import onnxruntime_genai as genai

    assert json.loads((folder / "genai_config.json").read_text())["search"]["chunk_size"] == 16
    model, found = genai.Model(str(folder)), {}
    for chunk in (16, 7, 45):
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=56, min_length=56, chunk_size=chunk)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(PROMPT.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found[chunk] = [int(token) for token in generator.get_sequence(0)]
    assert found[16] == found[7] == found[45]


def test_our_session_does_too(folder, monkeypatch):
    session = Session(folder)
    whole, cache = session.step(PROMPT, None)
    calls = []
    step = session.step
    monkeypatch.setattr(sessions, "PREFILL_CHUNK", 20)
    monkeypatch.setattr(session, "step", lambda ids, cache: calls.append(ids.shape[1]) or step(ids, cache))
    logits, grown = session.read(PROMPT, None)
    assert calls == [20, 20, 5]
    assert logits.shape[1] == 5 and np.abs(logits[:, -1] - whole[:, -1]).max() < 0.02 * np.abs(whole).max()
    assert all(a.shape == b.shape for a, b in zip(cache, grown, strict=True))
    assert list(session.stream(torch.from_numpy(PROMPT), 4)) == list(stream(step, PROMPT, 4))
    assert calls.count(20) == 4


def test_norms_write_only_what_is_read(folder):
    nodes = list(every_node(onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.node))
    norms = [node for node in nodes if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert len(norms) == 2 * 2 * 2  # two layers, two norms behind a sum, two ways
    read = {name for node in nodes for name in node.input}
    for norm in norms:
        assert norm.output[0] in read and list(norm.output[1:3]) in ([], ["", ""])
        assert all(name in read for name in norm.output[3:])


def test_refusals(tmp_path):
    for chunk in (0, -4):
        with pytest.raises(RecipeError, match=f"a decoder's prompt, 1 or more, got {chunk}"):
            qcompile.export_onnx(build("bert"), tmp_path / "m", chunk=chunk)
    with pytest.raises(RecipeError, match="chunk is for decoders"):
        qcompile.export_onnx(build("bert"), tmp_path / "m", example=example("bert"), chunk=16)
    assert not (tmp_path / "m").exists()
