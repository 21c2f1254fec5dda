"""Golden: what one layer of a decoder and of an encoder costs in operators."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from onnx_models import encoder_inputs, load_graph
from onnx_nodes import operators
from zoo import build, example

import qcompile
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize, Untie
from qcompile.recipe.recipe import Recipe


def test_the_graph_of_a_decoder(tmp_path):
    small = Quantize(Format.parse("int4/group32"), None, lm_head=Format.parse("int4/group32"), clip=True)
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = qcompile.export_onnx(model, tmp_path / "m", Recipe("small", (Untie(), small, Fuse())), progress=False)
    graph, counts = load_graph(tmp_path / "m")
    assert counts["MatMulNBits"] == 2 * 4 + 1 and counts["GroupQueryAttention"] == 2
    assert counts["SkipSimplifiedLayerNormalization"] == 4 and counts["SimplifiedLayerNormalization"] == 1
    assert counts["GatherBlockQuantized"] == 1 and counts["QuickGelu"] == 2 and counts["Split"] == 2
    assert sum(counts.values()) <= 28
    levels = {a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"}
    assert levels == {4}
    table = next(n for n in graph.node if n.op_type == "GatherBlockQuantized")
    logits = next(n for n in graph.node if "logits" in n.output)
    assert table.input[2] == logits.input[2]  # one table of scales; the codes of a larger one lie behind a Reshape
    assert report.metrics["onnx relative error"] < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (fused,) = [part for part in report.passes if part.name == "operators of ONNX Runtime"]
    assert len(fused.done) == 2 + 5 and not fused.skipped
    assert "2 GroupQueryAttention" in fused.notes and "2 activations" in fused.notes
    assert "2 matmuls packed into another of the same input" in fused.notes  # gate and up, beside the attentions'


def run(folder, batch):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in batch.items()})[0])


@pytest.mark.parametrize("recipe", [None, "int8", "int8-zero", "w4a16", "int4-cpu"])
def test_the_graph_of_an_encoder(recipe, tmp_path):
    """And texts of other lengths and paddings than the example's."""
    model, batch = build("bert"), encoder_inputs("bert", True)
    if recipe:
        qcompile.quantize(model, recipe, [batch], example=batch, progress=False)
    qcompile.export_onnx(model, tmp_path / "m", example=batch, accuracy_level=1, progress=False)
    graph, _ = load_graph(tmp_path / "m")
    counts = operators(graph.node)
    assert counts["MultiHeadAttention"] == 2 and counts["SkipLayerNormalization"] == 4
    assert counts["LayerNormalization"] == 1 and not counts["Softmax"] and not counts["Where"]
    products = ("MatMul", "Gemm", "MatMulIntegerToFloat", "MatMulNBits")
    unpacked = 2 if recipe == "int4-cpu" else 0  # q, k and v of a layer: rows of 4-bit codes are contiguous
    assert sum(counts[kind] for kind in products) == 2 * (4 + unpacked) + 1  # the last one is the pooler's
    if recipe == "w4a16":  # MatMulNBits adds its biases
        assert counts["Gelu"] == 2 and not counts["BiasGelu"]
    else:  # the others' are added by what follows
        assert counts["BiasGelu"] == 2 and not counts["Gelu"]
    added = [n.name for n in graph.node if n.op_type == "Add"]
    of_zero_points = [name for name in added if "int8_linear" in name]
    assert len(of_zero_points) == (2 * 8 if recipe == "int8-zero" else 0)  # two for each linear, and no biases
    assert len(added) - len(of_zero_points) <= 3  # the sums of the embeddings, and the pooler's bias
    attention = next(node for node in graph.node if node.op_type == "MultiHeadAttention")
    assert bool(attention.input[3]) == (recipe != "w4a16") and attention.input[4]
    for rows, length, kept in ((1, 5, [5]), (3, 11, [11, 4, 1])):
        ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(rows))
        mask = (torch.arange(length) < torch.tensor(kept)[:, None]).long()
        other = {"input_ids": ids, "attention_mask": mask}
        got, want = run(tmp_path / "m", other), model(**other).last_hidden_state
        error = float(((got - want) * mask[..., None]).norm() / want.norm())
        assert error < (1e-5 if recipe in (None, "w4a16") else 0.02), error


def test_an_encoder_has_no_cache(tmp_path):
    qcompile.export_onnx(build("bert"), tmp_path / "m", "w4a16", example=example("bert"), progress=False)
    assert load_graph(tmp_path / "m")[1]["GroupQueryAttention"] == 0
