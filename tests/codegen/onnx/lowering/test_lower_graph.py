"""Files that multiply by 4-bit codes for decode and in int8 for prefill, from the bytes of one weight."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_nodes import every_node, graph_of, open_session, operators, run
from zoo import build, example

import qcompile
from qcompile.codegen.onnx import variants
from qcompile.codegen.onnx.lowering.lower_graph import DECODE_TOKENS, lower_by_tokens
from qcompile.generation.onnx_session import Session
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.rule import Rule

DUAL = "int4-cpu"


def graph_in(folder):
    """The graph of a folder without its weights."""
    return onnx.load(str(folder / "model.onnx"), load_external_data=False).graph


def branches(graph):
    """Operators of both branches of the choice between decode and prefill."""
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    return {a.name: operators(a.g.node) for a in choice.attribute}


def bytes_of(tensor, data):
    """The bytes of an initializer, in a file of external data or not."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place:
        return tensor.raw_data
    return data[int(place["offset"]) :][: int(place["length"])]


SLOW = pytest.mark.slow
MODELS = ["llama", pytest.param("qwen2", marks=SLOW), pytest.param("gpt2", marks=SLOW)]


@pytest.fixture(scope="module", params=MODELS)  # no biases; some; all, and odd layouts
def folders(request, tmp_path_factory):
    """One model in files that multiply by 4-bit codes, in int8, and by both variants."""
    place = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    qcompile.quantize(model, DUAL, [example(request.param)], progress=False)
    qcompile.export_onnx(model, place / "both", progress=False)
    qcompile.export_onnx(model, place / "decode", low_memory=True, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "lower_by_tokens", functools.partial(lower_by_tokens, decode_tokens=0))
        qcompile.export_onnx(model, place / "prefill", progress=False)
    return place


@pytest.mark.slow
def test_decode_multiplies_by_codes_and_prefill_in_int8(folders):
    sessions = {name: Session(folders / name) for name in ("both", "decode", "prefill")}
    ids = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(0)).numpy()
    for tokens in range(1, 8):
        got = {name: session.step(ids[:, :tokens], None)[0] for name, session in sessions.items()}
        same, other = ("decode", "prefill") if tokens <= DECODE_TOKENS else ("prefill", "decode")
        assert np.array_equal(got["both"], got[same]) and not np.array_equal(got["both"], got[other])
    two_texts = np.concatenate([ids, ids])[:, :3]  # six tokens: texts count too
    logits = {name: session.step(two_texts, None)[0] for name, session in sessions.items()}
    assert np.array_equal(logits["both"], logits["prefill"])


def test_both_variants_read_the_same_bytes(folders):
    graph = graph_in(folders / "both")
    counts = branches(graph)
    unpacked = counts["then_branch"]["Split"] - counts["else_branch"]["Split"]  # gate and up, two in prefill
    assert counts["then_branch"]["MatMulNBits"] + unpacked == counts["else_branch"]["MatMulIntegerToFloat"] > unpacked
    assert not counts["then_branch"]["MatMulIntegerToFloat"] and not counts["else_branch"]["MatMulNBits"]
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    decode = next(a.g for a in choice.attribute if a.name == "then_branch")
    packed = [name for node in decode.node if node.op_type == "MatMulNBits" for name in (node.input[1], node.input[3])]
    views = [t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT4]
    assert len(views) == len(packed) + 2 * unpacked  # codes and zero points
    data = (folders / "both/model.onnx.data").read_bytes()
    by_name = {t.name: t for t in graph.initializer}
    for name in packed:
        parts = [bytes_of(t, data) for t in views if t.name.startswith(f"{name}/")]
        assert 1 <= len(parts) <= 2 and b"".join(parts) == bytes_of(by_name[name], data)
    sizes = [(folders / name / "model.onnx.data").stat().st_size for name in ("both", "decode")]
    assert sizes[0] == sizes[1]
    inside = [a.g.node for n in graph_in(folders / "decode").node if n.op_type == "If" for a in n.attribute]
    assert not any("MatMul" in n.op_type for nodes in inside for n in nodes), "one kernel to multiply, two to attend"


def test_the_int8_weights_are_computed_when_the_file_is_opened(folders):
    open_session(folders / "both/model.onnx", written=str(folders / "optimized.onnx"))
    graph = onnx.load(str(folders / "optimized.onnx"), load_external_data=False).graph
    assert not {n.op_type for n in graph.node} & {"Transpose", "Unsqueeze", "Mul", "Round", "MatMulInteger"}
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    prefill = next(a.g for a in choice.attribute if a.name == "else_branch")
    products = [node for node in prefill.node if node.op_type == "MatMulIntegerToFloat"]
    choices = [node for node in prefill.node if node.op_type == "If"]
    assert products and len(choices) == 2, "the processor is known, the length that two attentions ask for is not"
    matrices = {t.name for part in (graph, prefill) for t in part.initializer if math.prod(t.dims) > 16 * 16}
    read = {name for node in every_node(graph.node) for name in node.input}
    assert {node.input[1] for node in products} < matrices <= read, "weights for one kind of processor, nothing else"


def test_scales_are_stored_as_a_byte_per_group(folders):
    """And a float per row: the operators' float scales are computed when the file is opened."""
    for name in ("both", "decode"):
        graph = graph_in(folders / name)
        types = {t.name: (t.data_type, len(t.dims)) for t in graph.initializer}
        products = [n for n in every_node(graph.node) if n.op_type == "MatMulNBits"]
        producers = {n.output[0]: n for n in graph.node}  # not inside the branches, which share them
        for product in products:
            cast, rows = (producers[part] for part in producers[product.input[2]].input)
            assert types[cast.input[0]] == (onnx.TensorProto.INT8, 2) and types[rows.input[0]][1] == 1
        assert products and (onnx.TensorProto.FLOAT, 2) not in {t for n, t in types.items() if "scales" in n}


def test_norms_write_only_what_is_read(folders):
    nodes = list(every_node(graph_in(folders / "both").node))
    norms = [n for n in nodes if n.op_type in ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")]
    assert len(norms) == 2 * 2 * 2  # two layers, two norms behind a sum, two variants
    read = {name for node in nodes for name in node.input}
    for norm in norms:
        assert norm.output[0] in read and list(norm.output[1:3]) in ([], ["", ""])
        assert all(name in read for name in norm.output[3:])


def test_an_encoder_is_multiplied_in_int8_only(tmp_path):
    report = qcompile.export_onnx(
        build("bert"), tmp_path / "m", DUAL, [example("bert")], example=example("bert"), progress=False
    )
    kinds = operators(graph_in(tmp_path / "m").node)
    assert kinds["MatMulIntegerToFloat"] and not kinds["MatMulNBits"] and not kinds["If"]
    assert report.metrics["onnx relative error"] < 0.05


@pytest.mark.slow
def test_a_site_in_int8_beside_sites_in_four_bits(tmp_path):
    """It is multiplied in int8 in both branches of the choice."""
    recipe = find_recipe(DUAL)
    recipe = replace(recipe, rules=(Rule("*down_proj*", weight=Format("int8")), *recipe.rules))
    report = qcompile.export_onnx(build("llama"), tmp_path / "m", recipe, [example("llama")], progress=False)
    counts = branches(graph_in(tmp_path / "m"))
    assert counts["then_branch"]["MatMulIntegerToFloat"] == 2 and counts["then_branch"]["MatMulNBits"] > 0
    layers = 2  # in each, gate and up are one matmul in decode and two in prefill
    assert counts["else_branch"]["MatMulIntegerToFloat"] == 2 + counts["then_branch"]["MatMulNBits"] + layers
    assert report.metrics["onnx relative error"] < 0.2
    ids, session = torch.randint(0, 128, (1, 12)), Session(tmp_path / "m")
    whole, _ = session.step(ids.numpy(), None)
    first, cache = session.step(ids[:, :9].numpy(), None)
    logits = [first]
    for token in ids[0, 9:]:
        last, cache = session.step(token.view(1, 1).numpy(), cache)
        logits.append(last)
    assert np.linalg.norm(np.concatenate(logits, 1) - whole) < 0.2 * np.linalg.norm(whole)


@pytest.mark.slow
def test_per_tensor_activations_in_both_variants(tmp_path):
    """The preset for CPUs: sites that PerTensorActivations chose are the int8 matmuls without scales of rows."""
    model, batches = build("llama"), [{"input_ids": torch.randint(0, 128, (2, 24))} for _ in range(3)]
    qcompile.quantize(model, "int4-cpu-gptq", batches, progress=False)
    acts = {name: m.act for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    chosen = [name for name, act in acts.items() if act == Format("int8", "tensor")]
    assert chosen and len(chosen) < len(acts) and {acts[n] for n in set(acts) - set(chosen)} == {Format("int8")}
    report = qcompile.export_onnx(model, tmp_path / "m", progress=False)
    counts = branches(graph_in(tmp_path / "m"))
    packed = len({name for name in chosen if not name.endswith(("k_proj", "v_proj"))})
    per_token = len([name for name in acts if name not in chosen])
    assert counts["else_branch"]["MatMulIntegerToFloat"] == packed + per_token
    prefill = next(a.g for n in graph_in(tmp_path / "m").node for a in n.attribute if a.name == "else_branch")
    inputs = [len(n.input) for n in prefill.node if n.op_type == "ReduceMax"]  # of rows: the axis is the second
    assert (inputs.count(2), inputs.count(1)) == (per_token, packed)
    assert report.metrics["onnx relative error"] < 0.2


def test_the_number_of_tokens_chooses():
    """Up to a limit decode, which does not round activations; then prefill. One weight, by rows or for all."""
    rng, (n, k) = np.random.default_rng(0), (24, 64)
    s1, row = rng.integers(1, 8, (n, 2)), rng.uniform(0.5, 2, n)
    scales, b = (s1 * row[:, None]).astype(np.float32), rng.normal(size=n).astype(np.float32)
    x = rng.normal(size=(4, k)).astype(np.float32) * np.float32([[1], [5], [1], [1]])
    codes = rng.integers(0, 256, (n, 2, 16), np.uint8)
    q = np.stack([codes & 15, codes >> 4], -1).reshape(n, k).astype(int) - 8
    weight = q * np.repeat(scales, 32, 1)
    for per_row in (1, 0):
        text = f"""
            model (float[m, {k}] x) => (float[m, {n}] y) {{
                y = qcompile.DualLinear <K = {k}, N = {n}, bits = 4, block_size = 32, per_row = {per_row}> (
                    x, codes, scales, , row, b)
            }}"""
        model = graph_of(text, codes=codes, scales=scales, row=row.astype(np.float32), b=b)
        lowered = lower_by_tokens(model, decode_tokens=2 * k)
        for rows in (1, 2, 3):
            given = x[:rows]
            if rows > 2:
                step = np.abs(given).max(1 if per_row else None, keepdims=True) / np.float32(127)
                given = np.rint(given / step) * step
            want = given @ weight.T + b
            assert np.allclose(run(lowered, x[:rows])[0], want, rtol=1e-4, atol=1e-3 * np.abs(want).max()), rows


def test_nested_graphs_read_values_of_the_branch_around_them():
    """An If of the model's own inside the If on the number of tokens."""
    text = """
        model (float[n] x) => (float[n] y) {
            flag = Constant <value = bool {1}> ()
            doubled = Add (x, x)
            y = If (flag) <then_branch = inner () => (float[n] a) { a = Add (doubled, x) },
                           else_branch = other () => (float[n] b) { b = Neg (doubled) }>
        }"""
    lowered = lower_by_tokens(graph_of(text))
    onnx.checker.check_model(ir.to_proto(lowered), full_check=True)
    for length in (2, 9):
        assert run(lowered, np.ones(length, np.float32))[0].tolist() == [3.0] * length
