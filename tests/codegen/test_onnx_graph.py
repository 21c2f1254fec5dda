"""What a graph is rewritten to for ONNX Runtime: attentions found by probing, joined products, shared tables."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fuse_all import rewrite
from qcompile.codegen.onnx.fusions.attention import match_gqa as attentions
from qcompile.codegen.onnx.fusions.attention import rotary_embedding as rotary
from qcompile.codegen.onnx.fusions.attention.match_gqa import CachedAttention, find_attentions
from qcompile.codegen.onnx.fusions.tied_embedding import _turned, behind_matrix, nearest_turn
from qcompile.codegen.onnx.ops.attention_ops import causal, rotate
from qcompile.codegen.onnx.tracing.signature import WithCache
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.ir.capture import from_exported
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import FoldNorm, Fuse, Quantize, Rotate, Untie
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe

LENGTH = 64  # of the zoo's rotary tables
DECODERS = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "mixtral",
    "bloom",
]  # fmt: skip


def traced(model):
    wrapper = WithCache(model, 64)
    exported = torch.export.export(wrapper, wrapper.arguments(), dynamic_shapes=wrapper.dynamic_shapes(), strict=False)
    return from_exported(exported, wrapper), wrapper


@pytest.mark.parametrize("name", DECODERS)
def test_attentions_are_found_and_compute_the_same(name):
    model = build(name)
    program, wrapper = traced(model)
    found = find_attentions(program, LENGTH)
    assert len(found) == 2 and all(isinstance(a, CachedAttention) for a in found)
    before = {arguments: program(*wrapper.flat(arguments)) for arguments, _ in map(_keyed, wrapper.checks())}
    report, _ = rewrite(program, LENGTH)
    fused = program.graph.find_nodes(op="call_function", target=torch.ops.qcompile_onnx.group_attention.default)
    assert len(fused) == (0 if name == "gpt_neox" else 2)  # it turns 4 channels, the kernel takes 16
    assert len(report.skipped) == (2 if name == "gpt_neox" else 0)
    for arguments, want in before.items():
        assert relative_error(program(*wrapper.flat(arguments)), want) < 1e-5


class _Arguments(tuple):
    def __hash__(self):
        return id(self)


def _keyed(check):
    return _Arguments(check[0]), check[1]


@pytest.mark.parametrize("stretch", [24, 2048])
def test_what_is_known_of_an_attention(stretch, monkeypatch):
    monkeypatch.setattr(rotary, "STRETCH", stretch)
    program, _ = traced(build("phi3"))  # one product makes queries, keys and values
    found = find_attentions(program, LENGTH)[0]
    assert found.queries.source is found.keys.source is found.values.source
    assert found.queries.rows.tolist() == list(range(64))
    assert found.keys.rows.tolist() == list(range(64, 96)) and found.values.rows.tolist() == list(range(96, 128))
    assert found.heads == 4 and found.scale == pytest.approx(0.25) and found.window == -1
    model = build("phi3")
    positions = torch.arange(LENGTH)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, LENGTH, 64), positions)
    assert torch.allclose(found.rotary.cos, cos[0, :, :8], atol=1e-6)
    assert torch.allclose(found.rotary.sin, sin[0, :, :8], atol=1e-6)
    assert not found.rotary.interleaved


def test_a_window_is_measured():
    import transformers as tf
    from zoo import SIZES

    torch.manual_seed(0)
    model = tf.MistralForCausalLM(tf.MistralConfig(sliding_window=5, **SIZES)).eval()
    found = find_attentions(traced(model)[0], LENGTH)
    assert [a.window for a in found] == [5, 5]


@pytest.mark.parametrize("window", [-1, 3])
def test_the_mask_of_the_operator(window):
    seen = causal(4, 3, window)
    for new in range(3):
        for token in range(7):
            behind = 4 + new - token
            assert bool(seen[new, token]) == (behind >= 0 and (window < 0 or behind < window))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_rotary_embedding_of_the_operator_turns_pairs(interleaved):
    angle = torch.rand(5, 4) * 3
    x = torch.randn(2, 5, 12)
    turned = rotate(x, angle.cos(), angle.sin(), interleaved)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    for pair in range(4):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
        number = torch.complex(x[..., i], x[..., j]) * torch.polar(torch.ones(5), angle[:, pair])
        assert torch.allclose(turned[..., i], number.real, atol=1e-5)
        assert torch.allclose(turned[..., j], number.imag, atol=1e-5)


def test_a_table_that_grows_with_the_text_is_an_obstacle():
    model = build("llama")

    class Growing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, position_ids):
            cos, sin = self.inner(x, position_ids * 8 / (position_ids.max() + 1))
            return cos, sin

    model.model.rotary_emb = Growing(model.model.rotary_emb)
    found = find_attentions(traced(model)[0], LENGTH)
    assert all(isinstance(a, Obstacle) and "length of the text" in a.reason for a in found)


def nodes(folder):
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return graph, collections.Counter(n.op_type for n in graph.node)


def test_the_graph_of_a_decoder(tmp_path):
    """Golden: what one layer costs in operators."""
    small = Quantize(Format.parse("int4/group32"), None, lm_head=Format.parse("int4/group32"), clip=True)
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = qcompile.export_onnx(model, tmp_path / "m", Recipe("small", (Untie(), small, Fuse())), progress=False)
    graph, counts = nodes(tmp_path / "m")
    assert counts["MatMulNBits"] == 2 * 4 + 1 and counts["GroupQueryAttention"] == 2
    assert counts["SkipSimplifiedLayerNormalization"] == 4 and counts["SimplifiedLayerNormalization"] == 1
    assert counts["GatherBlockQuantized"] == 1 and counts["QuickGelu"] == 2 and counts["Split"] == 2
    assert sum(counts.values()) <= 28
    levels = {a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"}
    assert levels == {4}
    table = next(n for n in graph.node if n.op_type == "GatherBlockQuantized")
    logits = next(n for n in graph.node if "logits" in n.output)
    assert table.input[2] == logits.input[2]  # one table of scales; the codes of a larger one lie behind a Reshape
    assert report.numbers["onnx relative error"] < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", ["int4/group32/zero", "int8"])
def test_a_table_in_another_basis_is_the_codes_times_a_matrix(form, tmp_path):
    """Folding the last norm and rotating part the logits' weight from the table: one table in the file all the same."""
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2)
    small = Quantize(Format.parse(form), None, lm_head=Format.parse(form), clip=True)
    recipe = Recipe("turned", (Untie(), FoldNorm(), Rotate(), small, Fuse()))
    report = qcompile.export_onnx(model, tmp_path / "m", recipe, accuracy_level=1, progress=False)
    graph, counts = nodes(tmp_path / "m")
    assert counts["GatherBlockQuantized"] == 1 and counts["Gather"] == 0
    assert report.numbers["onnx relative error"] < 1e-5  # to the module that holds codes times the matrix
    sizes = [np.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(sizes) == 64 * 64 if form == "int8" else max(sizes) < 64 * 64  # behind 4-bit codes it has 8 bits


def test_the_nearest_matrix_is_the_one_that_folding_and_rotating_made():
    torch.manual_seed(0)
    table, gain, turn = torch.randn(9000, 24), torch.rand(24) + 0.5, torch.linalg.qr(torch.randn(24, 24)).Q
    want = turn.t() @ torch.diag(1 / gain) @ turn
    assert torch.allclose(nearest_turn(table * gain @ turn, table @ turn), want, atol=1e-5)
    flat = torch.cat([table, torch.zeros(9000, 1)], 1)  # a channel that is zero everywhere
    assert torch.allclose(flat @ nearest_turn(flat, flat), flat, atol=1e-5)


def test_the_preset_with_rotated_bases_holds_one_table(tmp_path):
    """Its codes of the logits are chosen by GPTQ, not by the table: still near enough behind a matrix."""
    batches = [{"input_ids": torch.randint(0, 128, (4, 32))} for _ in range(4)]
    options = dict(low_memory=True, progress=False)
    report = qcompile.export_onnx(build("llama"), tmp_path / "m", "int4-cpu-gptq", batches, **options)
    counts = nodes(tmp_path / "m")[1]
    assert counts["GatherBlockQuantized"] == 1 and counts["Gather"] == 0
    assert any("codes of the logits and multiplied by a matrix" in n for p in report.passes for n in p.notes)


def test_a_matrix_must_come_near_to_every_row_of_many():
    torch.manual_seed(0)
    table, turn, form = torch.randn(2000, 24), torch.linalg.qr(torch.randn(24, 24)).Q, Format.parse("int4/group32/zero")
    table[5] = 0  # of a token that is not used
    codes = quantize_tensor(table @ turn, form).dequantize()
    found = behind_matrix("table", table, codes, form)
    assert found is not None and torch.equal(found.numbers, codes @ found.turn.dequantize().t())
    rounded = float((quantize_tensor(table, form).dequantize() - table).norm())
    assert found.farther == pytest.approx(float((found.numbers - table).norm()) / rounded) and found.farther < 1.3
    assert behind_matrix("table", table[:47], codes[:47], form) is None, "fewer than twice as many rows as columns"
    other = table.clone()
    other[7] += 0.6 * torch.randn(24) * table[7].norm() / 24**0.5  # near on the whole, one token far off
    assert _turned(other, codes, form) is None
    assert behind_matrix("table", torch.randn(2000, 24), codes, form) is None


@pytest.mark.parametrize("form,products,matrix", [("int4/group32/zero", 3, [64, 1, 64]), ("int8", 1, [64, 64])])
def test_two_embeddings_of_one_turned_table_share_its_matrix(form, products, matrix, tmp_path):
    """Its matrix is not symmetric, unlike those that folding norms makes: turned round it would be another."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(256, 64), nn.Linear(64, 256, bias=False)
            self.head.weight.data = self.table.weight @ torch.linalg.qr(torch.randn(64, 64)).Q

        def forward(self, first, second):
            return self.head(self.table(first) * self.table(second))

    torch.manual_seed(0)
    small = Format.parse(form)
    ids = torch.arange(6).reshape(2, 3)
    example = dict(first=ids, second=ids + 9)
    options = dict(accuracy_level=1, progress=False, example=example)
    recipe = Recipe("small", (Quantize(small, None, lm_head=small), Fuse()))
    report = qcompile.export_onnx(Twice(), tmp_path / "m", recipe, **options)
    graph, counts = nodes(tmp_path / "m")
    assert counts["GatherBlockQuantized"] == 2 and report.numbers["onnx relative error"] < 1e-5
    assert counts["MatMulNBits"] == products and [list(t.dims) for t in graph.initializer].count(matrix) == 1


@pytest.mark.parametrize("change", ["untied", "turned"])
def test_a_table_that_the_codes_are_no_rounding_of_is_kept(change, tmp_path):
    """The proof holds the shared table's numbers in the module: it cannot see a table shared by mistake."""
    model = build("llama")
    if change == "untied":
        model.lm_head.weight = nn.Parameter(torch.randn(128, 64) * 0.02, requires_grad=False)
    else:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0), requires_grad=False)
    for form in ("int4/group32/zero", "int8"):
        small = Quantize(Format.parse(form), None, lm_head=Format.parse(form), clip=True)
        folder = tmp_path / form.replace("/", "-")
        qcompile.export_onnx(model, folder, Recipe("small", (small, Fuse())), progress=False)
        assert nodes(folder)[1]["GatherBlockQuantized"] == 0


def test_a_table_of_two_bits_is_kept(tmp_path):
    """MatMulNBits reads such codes, GatherBlockQuantized does not."""
    form = Format.parse("int2/group32/zero")
    small = Recipe("small", (Quantize(form, None, lm_head=form), Fuse()))
    report = qcompile.export_onnx(build("llama"), tmp_path / "m", small, accuracy_level=1, progress=False)
    graph, counts = nodes(tmp_path / "m")
    bits = {a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}
    assert bits == {2} and counts["GatherBlockQuantized"] == 0 and report.numbers["onnx relative error"] < 1e-5


def test_float_products_are_joined_too(tmp_path):
    qcompile.export_onnx(build("qwen2"), tmp_path / "m", progress=False)  # biases on queries, keys, values
    _, counts = nodes(tmp_path / "m")
    assert counts["MatMul"] + counts["Gemm"] == 2 * 4 + 1


def test_accuracy_level(tmp_path):
    model = build("llama")
    one = qcompile.export_onnx(model, tmp_path / "1", "w4a16", accuracy_level=1, progress=False)
    four = qcompile.export_onnx(model, tmp_path / "4", "w4a16", progress=False)
    assert one.numbers["onnx relative error as run"] == one.numbers["onnx relative error"] < 1e-5
    assert 1e-4 < four.numbers["onnx relative error as run"] < 0.1
    with pytest.raises(ValueError, match="accuracy_level 2"):  # before a recipe that does not exist is looked up
        qcompile.export_onnx(model, tmp_path / "2", "no such recipe", accuracy_level=2)


@pytest.mark.parametrize("flaw", ["rows", "scale", "window", "sin"])
def test_a_wrong_attention_is_not_exported(flaw, tmp_path, monkeypatch):
    real = attentions._Recogniser.result

    def wrong(self):
        import dataclasses

        found = real(self)
        if flaw == "rows":
            return dataclasses.replace(found, keys=dataclasses.replace(found.keys, rows=found.keys.rows.flip(0)))
        if flaw == "scale":
            return dataclasses.replace(found, scale=found.scale * 2)
        if flaw == "window":
            return dataclasses.replace(found, window=2)
        return dataclasses.replace(found, rotary=dataclasses.replace(found.rotary, sin=-found.rotary.sin))

    monkeypatch.setattr(attentions._Recogniser, "result", wrong)
    with pytest.raises(ExportMismatch):
        qcompile.export_onnx(build("llama"), tmp_path / "m", progress=False)


def test_an_encoder_has_no_cache(tmp_path):
    qcompile.export_onnx(build("bert"), tmp_path / "m", "w4a16", example=example("bert"), progress=False)
    assert nodes(tmp_path / "m")[1]["GroupQueryAttention"] == 0
