"""Models without a cache: attentions, norms and activations as operators of ONNX Runtime."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers as tf
from onnx_nodes import operators
from torch import nn
from zoo import ZOO, build, example

import qcompile
from qcompile.codegen.onnx.fuse_all import rewrite
from qcompile.codegen.onnx.fusions.attention import match_mha as plain_attention
from qcompile.codegen.onnx.fusions.attention import mha as plain
from qcompile.codegen.onnx.fusions.attention.match_mha import PlainAttention, find_plain_attentions
from qcompile.codegen.onnx.ops.attention_ops import multi_head_attention
from qcompile.codegen.onnx.tracing.signature import Plain
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.ir.capture import from_exported
from qcompile.recipe.certificate import relative_error

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
MORE = {
    "t5": lambda: tf.T5EncoderModel(
        tf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "clip_text": lambda: tf.CLIPTextModel(
        tf.CLIPTextConfig(max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SMALL)
    ),
    "modernbert": lambda: tf.ModernBertModel(
        tf.ModernBertConfig(
            local_attention=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            cls_token_id=1, sep_token_id=2, **SMALL | dict(num_hidden_layers=4),
        )
    ),
    "swin": lambda: tf.SwinModel(
        tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    ),
}  # fmt: skip


def made(name):
    with pytest.MonkeyPatch.context() as patch:
        for other, producer in MORE.items():
            patch.setitem(ZOO, other, producer)
        return build(name)


def inputs(name, padded=False):
    if name == "swin":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    found = example(name)
    if padded:
        found["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
        found["attention_mask"][1, 5:] = 0
    return found


def traced(model, batch):
    wrapper = Plain(model, batch)
    exported = torch.export.export(wrapper, wrapper.arguments(), dynamic_shapes=wrapper.dynamic_shapes(), strict=False)
    return from_exported(exported, wrapper), wrapper


@pytest.mark.parametrize(
    "name,padded,attentions,masked",
    [
        ("bert", False, 2, "nothing"), ("bert", True, 2, "padding"), ("vit", False, 2, "nothing"),
        ("whisper_encoder", False, 2, "nothing"), ("clip_text", False, 2, "causal"),
        ("clip_text", True, 2, "causal padding"), ("t5", True, 2, "bias"), ("swin", False, 4, ""),
        ("modernbert", False, 4, ""),
    ],
)  # fmt: skip
def test_attentions_are_found_and_compute_the_same(name, padded, attentions, masked):
    model, batch = made(name), inputs(name, padded)
    program, wrapper = traced(model, batch)
    calls = [arguments for arguments, _ in wrapper.checks()]
    before = [program(*wrapper.flat(arguments)) for arguments in calls]
    found = find_plain_attentions(program)
    assert len(found) == attentions and all(isinstance(a, PlainAttention) for a in found), found
    for a in found if masked else ():
        kinds = {"causal": a.is_causal, "padding": a.padding is not None, "bias": bool(a.added)}
        assert " ".join(kind for kind, there in kinds.items() if there) == masked.replace("nothing", "")
    report, _ = rewrite(program, None)
    fused = program.graph.find_nodes(op="call_function", target=torch.ops.qcompile_onnx.multi_head_attention.default)
    assert len(fused) == attentions and not report.skipped
    for arguments, want in zip(calls, before, strict=True):
        assert relative_error(program(*wrapper.flat(arguments)), want) < 1e-5


def test_a_mask_that_hides_everything_from_a_token_is_left():
    program, wrapper = traced(made("modernbert"), inputs("modernbert", True))
    want = program(*wrapper.flat(wrapper.arguments()))
    report, _ = rewrite(program, None)
    assert len(report.skipped) == 2 and all("tokens may see none" in place.reason for place in report.skipped)
    assert relative_error(program(*wrapper.flat(wrapper.arguments())), want) < 1e-5


def test_the_operator_hides_padding_and_what_comes_later():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 32) for _ in range(3))
    bias, added = torch.randn(96), torch.randn(1, 2, 4, 4)
    padding = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.int32)
    got = multi_head_attention(query, key, value, bias, padding, added, 2, 0.3, True)
    for row in range(2):
        for token in range(4):
            for head in range(2):
                own = slice(16 * head, 16 * head + 16)
                seen = [t for t in range(token + 1) if padding[row, t]]
                q = query[row, token, own] + bias[:32][own]
                k, v = key[row, seen][:, own] + bias[32:64][own], value[row, seen][:, own] + bias[64:][own]
                weights = (q @ k.t() * 0.3 + added[0, head, token, seen]).softmax(-1)
                assert torch.allclose(got[row, token, own], weights @ v, atol=1e-5)


def kinds(folder):
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return graph, operators(graph.node)


def run(folder, batch):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in batch.items()})[0])


@pytest.mark.parametrize("recipe", [None, "int8", "int8-zero", "w4a16", "int4-cpu"])
def test_the_graph_of_an_encoder(recipe, tmp_path):
    """Golden: what one layer costs in operators; and texts of other lengths and paddings than the example's."""
    model, batch = build("bert"), inputs("bert", True)
    if recipe:
        qcompile.quantize(model, recipe, [batch], example=batch, progress=False)
    qcompile.export_onnx(model, tmp_path / "m", example=batch, accuracy_level=1, progress=False)
    graph, counts = kinds(tmp_path / "m")
    assert counts["MultiHeadAttention"] == 2 and counts["SkipLayerNormalization"] == 4
    assert counts["LayerNormalization"] == 1 and not counts["Softmax"] and not counts["Where"]
    products = ("MatMul", "Gemm", "MatMulIntegerToFloat", "MatMulNBits")
    parted = 2 if recipe == "int4-cpu" else 0  # q, k and v of a layer: rows of 4-bit codes lie one after another
    assert sum(counts[kind] for kind in products) == 2 * (4 + parted) + 1  # the last one is the pooler's
    if recipe == "w4a16":  # MatMulNBits adds its biases
        assert counts["Gelu"] == 2 and not counts["BiasGelu"]
    else:  # the others' are added by what follows
        assert counts["BiasGelu"] == 2 and not counts["Gelu"]
    inside = ("unsigned_codes", "behind", "sum")  # of int8 weights: folded; of zero points for each row
    added = [n for n in graph.node if n.op_type == "Add" and not n.name.endswith(inside)]
    assert len(added) <= 3  # the sums of the embeddings, and the pooler's bias
    attention = next(node for node in graph.node if node.op_type == "MultiHeadAttention")
    assert bool(attention.input[3]) == (recipe != "w4a16") and attention.input[4]
    for rows, length, kept in ((1, 5, [5]), (3, 11, [11, 4, 1])):
        ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(rows))
        mask = (torch.arange(length) < torch.tensor(kept)[:, None]).long()
        other = {"input_ids": ids, "attention_mask": mask}
        got, want = run(tmp_path / "m", other), model(**other).last_hidden_state
        error = float(((got - want) * mask[..., None]).norm() / want.norm())
        assert error < (1e-5 if recipe in (None, "w4a16") else 0.02), error


@pytest.mark.parametrize(
    "name,padded,recipe",
    [
        ("vit", False, "int8"), ("vit", False, "w4a16"), ("whisper_encoder", False, "int8"), ("clip_text", False, None),
        ("clip_text", True, "w4a16"), ("t5", True, None), ("swin", False, None),
    ],
)  # fmt: skip
def test_encoders_of_all_kinds_in_onnx_runtime(name, padded, recipe, tmp_path):
    model = made(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # random scores are so small that everybody looks everywhere
    report = qcompile.export_onnx(model, tmp_path / "m", recipe, example=inputs(name, padded), progress=False)
    assert report.numbers["onnx relative error"] < (0.05 if recipe == "int8" else 1e-4)
    assert kinds(tmp_path / "m")[1]["MultiHeadAttention"] == (4 if name == "swin" else 2)


@pytest.mark.parametrize("flaw", ["scale", "padding", "heads", "bias", "causal"])
def test_a_wrong_attention_is_not_exported(flaw, tmp_path, monkeypatch):
    real = plain_attention._Recogniser.result

    def wrong(self):
        found = real(self)
        turned = dataclasses.replace(found.parts[1], rows=found.parts[1].rows.flip(0))
        change = {
            "scale": dict(scale=found.scale * 2), "padding": dict(padding=None), "causal": dict(is_causal=True),
            "heads": dict(parts=(found.parts[0], turned, found.parts[2])), "bias": {},
        }  # fmt: skip
        return dataclasses.replace(found, **change[flaw])

    monkeypatch.setattr(plain_attention._Recogniser, "result", wrong)
    if flaw == "bias":
        forgets = lambda program, a, name: (real_bias(program, a, name)[0], None)  # noqa: E731
        real_bias = plain._without_bias
        monkeypatch.setattr(plain, "_without_bias", forgets)
    model = build("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query.weight" in name or "key.weight" in name:
                parameter.mul_(20)  # random scores are so small that everybody looks everywhere
    with pytest.raises(ExportMismatch):
        qcompile.export_onnx(model, tmp_path / "m", example=inputs("bert", True), progress=False)


def spelled(kind):
    return {
        "erf": lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),
        "tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
        "gate": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": lambda x: x * x.sigmoid(),
        "other": lambda x: 0.5 * x * (1 + torch.tanh(0.7 * x)),
        "two": lambda x: x * torch.sigmoid(x.flip(-1)),
        "near": lambda x: x * (0.98 * torch.sigmoid(1.702 * x)),
        "square": lambda x: x * torch.relu(x),
    }[kind]


@pytest.mark.parametrize(
    "kind,operator",
    [("erf", "BiasGelu"), ("tanh", "FastGelu"), ("gate", "QuickGelu"), ("silu", "QuickGelu"), ("two", None),
     ("square", None), ("near", None)],
)  # fmt: skip
def test_activations_are_found_by_what_they_compute(kind, operator, tmp_path):
    class Spelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.way = nn.Linear(24, 32), nn.Linear(32, 8), spelled(kind)

        def forward(self, input):
            return self.second(self.way(self.first(input)))

    torch.manual_seed(0)
    model = Spelled().eval().requires_grad_(False)
    x = torch.randn(2, 5, 24) * 3
    report = qcompile.export_onnx(model, tmp_path / "m", example=x, progress=False)
    _, counts = kinds(tmp_path / "m")
    found = {name for name in counts if name.endswith("Gelu")}
    assert found == ({operator} if operator else set())
    assert np.allclose(run(tmp_path / "m", {"input": x}), model(x), atol=1e-4)
    assert report.numbers["onnx relative error"] < 1e-5


def test_a_tanh_that_is_no_gelu_is_a_gate(tmp_path):
    """0.5 x (1 + tanh a x) is x sigmoid(2 a x): an operator knows it by that name."""
    x = torch.randn(2, 5, 24)
    model = nn.Sequential(nn.Linear(24, 32), Way(spelled("other"))).eval()
    qcompile.export_onnx(model, tmp_path / "m", example=x, progress=False)
    graph, counts = kinds(tmp_path / "m")
    (node,) = [n for n in graph.node if n.op_type == "QuickGelu"]
    assert node.attribute[0].f == pytest.approx(1.4) and not counts["Tanh"]


class Way(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return self.way(x)


def test_a_norm_of_a_sum_of_four_dimensions_is_left(tmp_path):
    """As in vision models that keep height and width: the operator takes [B, T, C] only."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)

        def forward(self, x):
            y = x + self.a(x)
            return y + self.b(self.norm(y))

    torch.manual_seed(0)
    report = qcompile.export_onnx(Block(), tmp_path / "m", example=torch.randn(2, 4, 4, 16), progress=False)
    assert report.numbers["onnx relative error"] < 1e-5


def test_outputs_of_other_types_keep_them(tmp_path):
    """The exporter knows no types behind our own nodes; a file must not say float of whole numbers."""

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(32, 5)

        def forward(self, x):
            scores = self.scores(x)
            return scores, scores.argmax(-1), scores > 0

    model, x = Classes().eval(), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    qcompile.export_onnx(model, tmp_path / "m", "w8a16", [{"x": x}], example={"x": x}, progress=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m/model.onnx"))
    assert [o.type for o in session.get_outputs()] == ["tensor(float)", "tensor(int64)", "tensor(bool)"]
    for got, want in zip(session.run(None, {"x": x.numpy()})[1:], model(x)[1:], strict=True):
        assert (torch.from_numpy(got) == want).float().mean() > 0.9, "near ties of rounded weights at most"
