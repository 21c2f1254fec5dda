"""The files beside model.onnx, read off the graph."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from onnx_models import encoder_inputs
from zoo import build

from qcompile.codegen.onnx.folder_files import write_folder_files
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.codegen.onnx.rewrite_graph import rewrite
from qcompile.codegen.onnx.sentence_embedding import PooledEncoder
from qcompile.codegen.onnx.tracing.trace import trace


@pytest.mark.parametrize("contrib_ops", [True, False])
def test_a_decoder_is_described_as_its_graph_is(contrib_ops, tmp_path):
    """Only where nothing but GroupQueryAttention reads the length of a cache can its buffer be longer."""
    options = OnnxOptions(contrib_ops=contrib_ops, chunk=8)
    traced = trace(build("llama"), None, contrib_ops)
    rewrite(traced, options, None)
    write_folder_files(tmp_path, traced, options, None)
    written = json.loads((tmp_path / "genai_config.json").read_text())
    decoder, search = written["model"]["decoder"], written["search"]
    assert decoder["num_hidden_layers"] == 2 and decoder["num_key_value_heads"] == 2 and decoder["head_size"] == 16
    assert decoder["num_attention_heads"] == (4 if contrib_ops else 2), "of the fused attentions, if there are any"
    assert decoder["hidden_size"] == 64 and written["model"]["vocab_size"] == 128
    assert search["past_present_share_buffer"] == contrib_ops and search["chunk_size"] == 8
    assert (tmp_path / "config.json").is_file() and (tmp_path / "generation_config.json").is_file()


@pytest.mark.parametrize("limit,length", [(10**30, 64), (50, 50)])
def test_an_encoder_is_one_of_sentence_transformers(limit, length, tmp_path):
    saved = []
    tokenizer = SimpleNamespace(model_max_length=limit, save_pretrained=saved.append)
    options = OnnxOptions(pooling="mean")
    model = PooledEncoder(build("bert"), options.sentence_pooling).eval()
    traced = trace(model, encoder_inputs("bert", True), True)
    rewrite(traced, options, None)
    write_folder_files(tmp_path, traced, options, tokenizer)
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"] == length
    assert json.loads((tmp_path / "1_Pooling/config.json").read_text())["word_embedding_dimension"] == 64
    assert saved == [str(tmp_path)] and not (tmp_path / "genai_config.json").exists()
