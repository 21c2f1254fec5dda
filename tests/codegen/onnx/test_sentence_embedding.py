"""Sentence embeddings as an output of the file, and the folder that sentence-transformers reads."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile.api import export_onnx
from qcompile.calibration.text import sentence_batches, sentences
from qcompile.codegen.onnx.sentence_embedding import POOLING_MODES, PooledEncoder, Pooling, PoolingError
from qcompile.generation.pretrained import load_encoder
from qcompile.recipe.rule import RecipeError


def padded():
    batch = example("bert")
    batch["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    batch["attention_mask"][1, 5:] = 0
    return batch


def outputs(folder, batch):
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = {name: value.numpy() for name, value in batch.items()}
    return dict(zip(names, map(torch.from_numpy, session.run(None, feeds)), strict=True))


def test_what_is_pooled():
    tokens = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])  # padding on either side
    assert torch.allclose(Pooling("mean")(tokens, mask), torch.stack([tokens[0].mean(0), tokens[1, 1:3].mean(0)]))
    assert torch.equal(Pooling("cls")(tokens, mask), tokens[:, 0])
    assert torch.equal(Pooling("last")(tokens, mask), torch.stack([tokens[0, 3], tokens[1, 2]]))
    one = Pooling("last", normalize=True)(tokens, mask)
    assert torch.allclose(one.norm(dim=-1), torch.ones(2))
    assert torch.allclose(one[0] * tokens[0, 3].norm(), tokens[0, 3])


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_file_has_sentence_embeddings(mode, normalize, tmp_path):
    model, batch = build("bert"), padded()
    qcompile.export_onnx(model, tmp_path / "m", example=batch, pooling=mode, normalize=normalize, progress=False)
    other = {"input_ids": torch.randint(3, 128, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    other["attention_mask"][1, 2:] = 0
    for texts in (batch, other):
        got = outputs(tmp_path / "m", texts)
        assert list(got) == ["last_hidden_state", "sentence_embedding"]
        want = PooledEncoder(model, Pooling(mode, normalize))(**texts)["sentence_embedding"]
        assert torch.allclose(got["sentence_embedding"], want, atol=1e-4)
    modes = json.loads((tmp_path / "m/1_Pooling/config.json").read_text())
    chosen = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    assert [name for name, on in modes.items() if on is True and name != "include_prompt"] == [chosen[mode]]
    assert modes["word_embedding_dimension"] == 64
    kinds = [entry["type"].rpartition(".")[2] for entry in json.loads((tmp_path / "m/modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling"] + ["Normalize"] * normalize
    assert json.loads((tmp_path / "m/sentence_bert_config.json").read_text())["max_seq_length"] == 64


def test_outputs_have_the_names_of_the_model(tmp_path):
    qcompile.export_onnx(build("bert"), tmp_path / "m", example=padded(), progress=False)
    assert list(outputs(tmp_path / "m", padded())) == ["last_hidden_state", "pooler_output"]


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask):
        return self.linear(input_ids[:, :1].float().expand(-1, 4))


def test_what_cannot_be_pooled_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "quantize", None)
    model = build("bert")
    for options, error, words in (
        (dict(pooling="max"), PoolingError, "'max' is unknown. Fix: use one of mean, cls, last"),
        (dict(pooling="mean"), PoolingError, "attention_mask"),
        (dict(pooling="mean", example=example("bert")), PoolingError, "attention_mask"),
        (dict(normalize=True, example=padded()), RecipeError, "give pooling="),
    ):
        with pytest.raises(error, match=words):
            qcompile.export_onnx(model, tmp_path / "m", "int8", progress=False, **options)
    with pytest.raises(PoolingError, match="not one embedding for each token"):
        qcompile.export_onnx(Flat(), tmp_path / "m", "int8", example=padded(), pooling="mean", progress=False)
    assert not list(tmp_path.iterdir())


def test_sentences_for_an_encoder():
    chosen = sentences(count=5)
    assert len(chosen) == 5 and all(40 < len(s) < 200 for s in chosen)
    with pytest.raises(ValueError, match="no sentence of 40 to 200"):
        from qcompile.calibration import text

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "embedded_text", lambda: "short. words.")
            sentences()


@pytest.mark.slow
def test_a_real_encoder_from_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from qcompile.cli import app

    options = ["--recipe", "w4a16", "--pooling", "mean", "--normalize"]
    done = CliRunner().invoke(app, ["export-onnx", "embedded", str(tmp_path / "m"), *options])
    assert done.exit_code == 0, done.output
    assert "6 MultiHeadAttention" in done.output and "12 LayerNorms of a sum" in done.output
    model, tokenizer = load_encoder()
    texts = sentence_batches(tokenizer, sentences(count=40)[1::2])[0]
    got = outputs(tmp_path / "m", texts)["sentence_embedding"].numpy()
    want = PooledEncoder(model, Pooling("mean", True))(**texts)["sentence_embedding"].numpy()
    similarity = (got * want).sum(1)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5) and similarity.mean() > 0.95


def test_a_model_with_a_head_is_refused(tmp_path):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build("bert")

        def forward(self, **inputs):
            return {"logits": self.model(**inputs)[0]}

    with pytest.raises(PoolingError, match="returns logits, and no last_hidden_state. Fix: give it without its head"):
        qcompile.export_onnx(Head(), tmp_path / "m", example=padded(), pooling="mean", progress=False)
    assert not (tmp_path / "m").exists()
