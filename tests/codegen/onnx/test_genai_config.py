"""genai_config.json: folders run unchanged in onnxruntime-genai, and our session reads the longest text from it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx_models import scale_weights
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.genai_config import FILE, DecoderConfig, write_genai_config
from qcompile.generation.onnx_session import FolderError, Session

DECODER = DecoderConfig(
    layers=3, heads=8, kv_heads=2, head_size=16, hidden_size=128, vocabulary=99, positions=64, shares_buffer=True,
    chunk=None,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gemma3", "falcon", "bloom", "gemma2"])
def test_runs_unchanged_in_onnxruntime_genai(name, tmp_path):
    """One row and two, against `generate` of the quantized model."""
    import onnxruntime_genai as genai

    model = build(name)
    scale_weights(model, 20 if name == "bloom" else 6)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    qcompile.quantize(model, "w4a16", [example(name)], progress=False)
    qcompile.export_onnx(model, tmp_path / "m", accuracy_level=1, progress=False)
    if tied:  # the file has one table for both, in codes
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(model.get_output_embeddings().weight)
    assert json.loads((tmp_path / "m/genai_config.json").read_text())["search"]["past_present_share_buffer"]
    for rows in ([[5, 9, 17, 33]], [[5, 9, 17, 33], [90, 8, 51, 70]]):
        want = model.generate(
            torch.tensor(rows), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        ).tolist()
        assert len(set(want[0][4:])) > 2, "a text that says the same token for ever proves little"
        parameters = genai.GeneratorParams(folder := genai.Model(str(tmp_path / "m")))
        parameters.set_search_options(max_length=16, min_length=16, batch_size=len(rows))
        generator = genai.Generator(folder, parameters)
        generator.append_tokens(np.array(rows, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert [[int(t) for t in generator.get_sequence(i)] for i in range(len(rows))] == want


def test_a_text_beyond_the_tables_is_refused(tmp_path):
    qcompile.export_onnx(build("llama"), tmp_path / "m", progress=False)
    session = Session(tmp_path / "m")
    ids = torch.randint(3, 128, (1, 64))
    assert session(input_ids=ids).shape == (1, 64, 128)
    with pytest.raises(FolderError, match="65 tokens: .* end at 64"):
        session(input_ids=torch.cat([ids, ids[:, :1]], 1))


def test_special_tokens_come_from_the_first_config_that_has_them(tmp_path):
    generation = SimpleNamespace(eos_token_id=[7, 8], pad_token_id=None)
    config = SimpleNamespace(eos_token_id=1, bos_token_id=5)
    write_genai_config(tmp_path, DECODER, (generation, config))
    written = json.loads((tmp_path / FILE).read_text())
    model = written["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (5, [7, 8], 7)
    decoder = model["decoder"]
    names = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[name] for name in names] == [16, 128, 8, 3, 2]
    assert (model["vocab_size"], model["context_length"], written["search"]["max_length"]) == (99, 64, 64)
    assert "chunk_size" not in written["search"]
    write_genai_config(tmp_path, DecoderConfig(**vars(DECODER) | {"chunk": 32}), (None, None))
    written = json.loads((tmp_path / FILE).read_text())
    assert written["search"]["chunk_size"] == 32 and "eos_token_id" not in written["model"]


def test_genai_reads_in_chunks_what_it_reads_at_once(tmp_path):
    """A W4A8 decoder: the variant of a chunk depends on its length."""
    import onnxruntime_genai as genai

    qcompile.export_onnx(build("llama"), tmp_path / "m", "int4-cpu", [example("llama")], chunk=16, progress=False)
    assert json.loads((tmp_path / "m" / FILE).read_text())["search"]["chunk_size"] == 16
    prompt = np.random.default_rng(0).integers(3, 128, (1, 45), np.int32)
    model, texts = genai.Model(str(tmp_path / "m")), {}
    for chunk in (16, 7, 45):
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=56, min_length=56, chunk_size=chunk)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        texts[chunk] = [int(token) for token in generator.get_sequence(0)]
    assert texts[16] == texts[7] == texts[45]
