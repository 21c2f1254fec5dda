"""Embedding tables that nothing else reads are int8 in the file, unless the user or the graph says otherwise."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.fusions import int8_embedding
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse, Quantize
from qcompile.recipe.recipe import Recipe

WEIGHTS = Recipe("w8", (Quantize(Format("int8"), None), Fuse()))
NO_LOGITS = Recipe("layers", (Quantize(Format("int8"), None, lm_head=None), Fuse()))


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(int8_embedding, "MIN_ELEMENTS", 0)


def floats(folder):
    """Shapes of the float tables of two dimensions in a file."""
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return [tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]


def notes(report):
    return [note for note in report.passes[-1].notes if "int8 embedding" in note]


@pytest.mark.parametrize("options", [{"accuracy_level": 1}, {"contrib_ops": False}])
def test_the_file_computes_with_rounded_tables(options, tmp_path):
    model, inputs = build("bert"), example("bert")
    report = qcompile.quantize(model, WEIGHTS, [inputs], example=inputs, progress=False)
    report = qcompile.export_onnx(model, tmp_path / "m", example=inputs, progress=False, **options)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert len(notes(report)) == len(tables) == 3, "of tokens, of places, of kinds"
    exact = onnxruntime.SessionOptions()
    exact.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(tmp_path / "m/model.onnx"), exact, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    with torch.no_grad():
        before = model(**inputs).last_hidden_state.numpy()
        for table in tables:
            table.weight.copy_(quantize_tensor(table.weight, Format.parse("int8/group64")).dequantize())
        want = model(**inputs).last_hidden_state.numpy()
    assert np.abs(got - want).max() < 1e-4 < np.abs(before - want).max()
    assert not {tuple(table.weight.shape) for table in tables} & set(floats(tmp_path / "m"))


@pytest.mark.parametrize("options", [{}, {"contrib_ops": False}])
@pytest.mark.parametrize("columns, block", [(192, 64), (40, 128)])  # three blocks; a part of one
def test_blocks_of_a_table(columns, block, options, tmp_path):
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, columns)
    table.weight.data *= torch.linspace(0.1, 10, columns)  # every block has scales of its own
    model = torch.nn.Sequential(table, torch.nn.Linear(columns, 64)).eval().requires_grad_(False)
    inputs = torch.randint(0, 50, (2, 7))
    qcompile.quantize(model, WEIGHTS, [inputs], example=inputs, progress=False)
    qcompile.export_onnx(model, tmp_path / "m", example=inputs, progress=False, **options)
    session = onnxruntime.InferenceSession(str(tmp_path / "m/model.onnx"), providers=["CPUExecutionProvider"])
    (node,) = session.get_inputs()
    got = torch.from_numpy(session.run(None, {node.name: inputs.numpy()})[0])
    near = quantize_tensor(table.weight, Format("int8", "group", block)).dequantize()
    want = model[1](near[inputs])
    assert float((got - want).norm() / want.norm()) < 0.01


@pytest.mark.slow
def test_what_keeps_its_floats(tmp_path, monkeypatch):
    """A float model, a user who asks for it, tables that are small, and one that float logits read too."""
    model, inputs = build("bert"), example("bert")
    table = tuple(model.get_input_embeddings().weight.shape)
    assert not notes(qcompile.export_onnx(model, tmp_path / "float", example=inputs, progress=False))
    qcompile.quantize(model, WEIGHTS, [inputs], example=inputs, progress=False)
    requested = qcompile.export_onnx(
        model, tmp_path / "requested", example=inputs, float_embeddings=True, progress=False
    )
    monkeypatch.setattr(int8_embedding, "MIN_ELEMENTS", 10**6)
    small = qcompile.export_onnx(model, tmp_path / "small", example=inputs, progress=False)
    assert not notes(requested) and not notes(small)
    assert all(table in floats(tmp_path / folder) for folder in ("float", "requested", "small"))
    monkeypatch.setattr(int8_embedding, "MIN_ELEMENTS", 0)
    tied = build("llama")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    qcompile.quantize(tied, NO_LOGITS, [example("llama")], progress=False)
    assert not notes(qcompile.export_onnx(tied, tmp_path / "tied", progress=False))


def test_a_decoder_with_logits_of_its_own(tmp_path):
    model = build("qwen2")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    before = model.get_input_embeddings().weight.clone()
    qcompile.quantize(model, WEIGHTS, [example("qwen2")], progress=False)
    report = qcompile.export_onnx(model, tmp_path / "m", progress=False)
    assert len(notes(report)) == 1 and tuple(before.shape) not in floats(tmp_path / "m")
    assert torch.equal(model.get_input_embeddings().weight, before), "the model is not changed"


def test_a_wrong_table_is_not_exported(tmp_path, monkeypatch):
    real = int8_embedding.to_matmul_nbits

    def swapped(source):
        codes, scales, zeros = real(source)
        return codes.roll(1, 0), scales, zeros

    monkeypatch.setattr(int8_embedding, "to_matmul_nbits", swapped)
    model, inputs = build("bert"), example("bert")
    qcompile.quantize(model, WEIGHTS, [inputs], example=inputs, progress=False)
    with pytest.raises(ExportMismatch):
        qcompile.export_onnx(model, tmp_path / "m", example=inputs, progress=False)
    assert not list(tmp_path.iterdir())
