"""Files that multiply in two ways, and files that give the last logits only."""

from __future__ import annotations

import collections
import functools
import math
from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx_nodes import operators
from torch import nn
from zoo import build, example

import qcompile
import qcompile.codegen.onnx.variants as finish
from qcompile.api import export_onnx
from qcompile.codegen.onnx.fusions.last_token_logits import last_tokens
from qcompile.codegen.onnx.lowering import matmul_integer as lower_int8
from qcompile.codegen.onnx.lowering.matmul_nbits import FEW, by_tokens
from qcompile.codegen.onnx.tracing.onnx_linear import NoOnnxForm
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.generation.onnx_session import FolderError, Session
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.int8_matmul import processor
from qcompile.pipeline.presets import find_recipe
from qcompile.recipe.rule import RecipeError, Rule

DUAL = "int4-cpu"


def opened(path):
    return onnx.load(str(path / "model.onnx"), load_external_data=False).graph


def branches(graph):
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    return {a.name: operators(a.g.node) for a in choice.attribute}


def held(tensor, data):
    """The bytes of an initializer, in a file of external data or not."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place:
        return tensor.raw_data
    return data[int(place["offset"]) :][: int(place["length"])]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])  # no biases; some; all, and odd layouts
def folders(request, tmp_path_factory):
    """One model in files that multiply by 4-bit codes, in int8, and in both ways."""
    place = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    batch = [example(request.param)]
    qcompile.quantize(model, DUAL, batch, progress=False)
    qcompile.export_onnx(model, place / "both", progress=False)
    qcompile.export_onnx(model, place / "few", low_memory=True, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "by_tokens", functools.partial(by_tokens, few=0))
        qcompile.export_onnx(model, place / "many", progress=False)
    return model, place


def test_few_tokens_are_multiplied_by_codes_and_many_in_int8(folders):
    model, place = folders
    sessions = {name: Session(place / name) for name in ("both", "few", "many")}
    ids = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(0)).numpy()
    for tokens in range(1, 8):
        got = {name: session.step(ids[:, :tokens], None)[0] for name, session in sessions.items()}
        same, other = ("few", "many") if tokens <= FEW else ("many", "few")
        assert np.array_equal(got["both"], got[same]) and not np.array_equal(got["both"], got[other])
    two_rows = np.concatenate([ids, ids])[:, :3]  # six tokens: rows count too
    logits = {name: session.step(two_rows, None)[0] for name, session in sessions.items()}
    assert np.array_equal(logits["both"], logits["many"])


def test_both_ways_read_the_same_bytes(folders):
    model, place = folders
    graph = opened(place / "both")
    counts = branches(graph)
    parted = counts["then_branch"]["Split"] - counts["else_branch"]["Split"]  # gate and up, two for many tokens
    assert counts["then_branch"]["MatMulNBits"] + parted == counts["else_branch"]["MatMulIntegerToFloat"] > parted
    assert not counts["then_branch"]["MatMulIntegerToFloat"] and not counts["else_branch"]["MatMulNBits"]
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    few = next(a.g for a in choice.attribute if a.name == "then_branch")
    packed = [name for node in few.node if node.op_type == "MatMulNBits" for name in (node.input[1], node.input[3])]
    seen = [t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT4]
    assert len(seen) == len(packed) + 2 * parted  # codes and zero points
    data = (place / "both/model.onnx.data").read_bytes()
    by_name = {t.name: t for t in graph.initializer}
    for name in packed:
        parts = [held(t, data) for t in seen if f"qcompile/{name}/" in t.name]
        assert 1 <= len(parts) <= 2 and b"".join(parts) == held(by_name[name], data)
    sizes = [(place / name / "model.onnx.data").stat().st_size for name in ("both", "few")]
    assert sizes[0] == sizes[1]
    inside = [a.g.node for n in opened(place / "few").node if n.op_type == "If" for a in n.attribute]
    assert not any("MatMul" in n.op_type for nodes in inside for n in nodes), "one way to multiply, two to attend"


def test_the_int8_weights_are_computed_when_the_file_is_opened(folders):
    _, place = folders
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(place / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(place / "both/model.onnx"), options, providers=["CPUExecutionProvider"])
    opened_graph = onnx.load(str(place / "optimized.onnx"), load_external_data=False).graph
    assert not {n.op_type for n in opened_graph.node} & {"Transpose", "Unsqueeze", "Mul", "Round", "MatMulInteger"}
    (choice,) = [node for node in opened_graph.node if node.op_type == "If"]
    many = next(a.g for a in choice.attribute if a.name == "else_branch")
    products = [node for node in many.node if node.op_type == "MatMulIntegerToFloat"]
    choices = [node for node in many.node if node.op_type == "If"]
    assert products and len(choices) == 2, "the processor is known, the length that two attentions ask for is not"
    matrices = {t.name for graph in (opened_graph, many) for t in graph.initializer if math.prod(t.dims) > 16 * 16}
    read = {name for node in every(opened_graph) for name in node.input}
    assert {node.input[1] for node in products} < matrices <= read, "weights of one kind of processor, no steps to them"


def test_an_encoder_is_multiplied_in_int8_only(tmp_path):
    report = qcompile.export_onnx(
        build("bert"), tmp_path / "m", DUAL, [example("bert")], example=example("bert"), progress=False
    )
    kinds = operators(opened(tmp_path / "m").node)
    assert kinds["MatMulIntegerToFloat"] and not kinds["MatMulNBits"] and not kinds["If"]
    assert report.numbers["onnx relative error"] < 0.05


def test_a_wrong_zero_point_is_found(tmp_path, monkeypatch):
    """The two proofs are separate: a fault in the int8 weights alone must not pass."""
    real = finish.one_way

    def wrong(model, way, portable):
        found = real(model, way, portable)
        for node in found.graph.node:
            if node.op_type == "Sub" and node.output[0].endswith("levels"):
                node.op_type = "Add"  # the zero point
        return found

    monkeypatch.setattr(finish, "one_way", wrong)
    with pytest.raises(ExportMismatch, match="differs from the module"):
        qcompile.export_onnx(build("llama"), tmp_path / "m", DUAL, [example("llama")], progress=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.skipif(processor() not in ("vnni", "amx"), reason="this processor runs that branch itself")
def test_the_proof_runs_what_other_processors_run(tmp_path, monkeypatch):
    """A fault in the branch that this processor does not take must not pass."""
    real = lower_int8.Int8Product._branch

    def wrong(self, kind, *rest):
        graph = real(self, kind, *rest)
        for node in graph.node:
            if node.output[0].endswith("unsigned_codes"):
                node.op_type = "Sub"
                node.input[1] = self._u8(127)
        return graph

    monkeypatch.setattr(lower_int8.Int8Product, "_branch", wrong)
    with pytest.raises(ExportMismatch, match="differs from the module"):
        qcompile.export_onnx(build("llama"), tmp_path / "m", DUAL, [example("llama")], progress=False)


def test_a_site_in_int8_beside_sites_in_four_bits(tmp_path):
    """It is multiplied in int8 however many tokens there are, in both branches of the choice."""
    recipe = find_recipe(DUAL)
    recipe = replace(recipe, rules=(Rule("*down_proj*", weight=Format("int8")), *recipe.rules))
    report = qcompile.export_onnx(build("llama"), tmp_path / "m", recipe, [example("llama")], progress=False)
    counts = branches(opened(tmp_path / "m"))
    assert counts["then_branch"]["MatMulIntegerToFloat"] == 2 and counts["then_branch"]["MatMulNBits"] > 0
    layers = 2  # in each, gate and up are one product for few tokens and two for many
    assert counts["else_branch"]["MatMulIntegerToFloat"] == 2 + counts["then_branch"]["MatMulNBits"] + layers
    assert report.numbers["onnx relative error"] < 0.2
    ids, session = torch.randint(0, 128, (1, 12)), Session(tmp_path / "m")
    whole, _ = session.step(ids.numpy(), None)
    first, cache = session.step(ids[:, :9].numpy(), None)
    steps = [first]
    for token in ids[0, 9:]:
        logits, cache = session.step(token.view(1, 1).numpy(), cache)
        steps.append(logits)
    found = np.concatenate(steps, 1)
    assert np.linalg.norm(found - whole) < 0.2 * np.linalg.norm(whole)


def test_one_step_for_all_tokens_in_both_ways(tmp_path):
    """The preset for CPUs, proven in both ways; sites that PerTensorActivations chose are the products without steps of rows."""
    model, batches = build("llama"), [{"input_ids": torch.randint(0, 128, (2, 24))} for _ in range(3)]
    qcompile.quantize(model, "int4-cpu-gptq", batches, progress=False)
    acts = {name: m.act for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    chosen = [name for name, act in acts.items() if act == Format("int8", "tensor")]
    assert chosen and len(chosen) < len(acts) and {acts[n] for n in set(acts) - set(chosen)} == {Format("int8")}
    report = qcompile.export_onnx(model, tmp_path / "m", progress=False)
    counts = branches(opened(tmp_path / "m"))
    joined = len({name for name in chosen if not name.endswith(("k_proj", "v_proj"))})
    alone = len([name for name in acts if name not in chosen])
    assert counts["else_branch"]["MatMulIntegerToFloat"] == joined + alone
    many = next(a.g for n in opened(tmp_path / "m").node for a in n.attribute if a.name == "else_branch")
    rows = [n for n in many.node if n.op_type == "ReduceMax" and len(n.input) == 2]
    every_token = [n for n in many.node if n.op_type == "ReduceMax" and len(n.input) == 1]
    assert (len(rows), len(every_token)) == (alone, joined)
    assert report.numbers["onnx relative error"] < 0.2


def generated(folder, rows, length=14):
    import onnxruntime_genai as genai

    parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
    parameters.set_search_options(max_length=length, min_length=length, batch_size=len(rows))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(rows, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(i).tolist() for i in range(len(rows))]


@pytest.mark.parametrize(
    "name,recipe,portable",
    [
        ("llama", DUAL, False), ("llama", "w4a16", True), ("gpt2", DUAL, False), ("gemma3", "w4a16", False),
        ("gemma2", "w4a16", False),  # a soft cap behind the logits
    ],
)  # fmt: skip
def test_the_last_logits_are_enough_to_generate(name, recipe, portable, tmp_path):
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():  # what layers add must outweigh the token, or it repeats for ever
            if parameter.ndim == 2 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(6)
    options = dict(accuracy_level=4 if portable else 1, contrib_ops=not portable, progress=False)
    qcompile.export_onnx(model, tmp_path / "all", recipe, [example(name)], **options)
    qcompile.export_onnx(model, tmp_path / "last", recipe, [example(name)], last_logits=True, **options)
    rows = [[5, 9, 17, 33], [90, 8, 51, 0]]  # genai pads the shorter behind
    if recipe == DUAL:  # of more tokens "all" rounds what the logits read, and a near tie may fall to the other side
        rows = [row[:2] for row in rows]
    assert generated(tmp_path / "all", rows) == generated(tmp_path / "last", rows)
    session, ids = Session(tmp_path / "last"), torch.tensor([[5, 9, 17, 33, 90, 8, 51, 2]])
    every, last = Session(tmp_path / "all").step(ids.numpy(), None)[0], session.step(ids.numpy(), None)[0]
    assert np.linalg.norm(last - every[:, -1:]) < 0.02 * np.linalg.norm(last) < np.linalg.norm(last - every[:, -2:-1])
    assert session.step(ids.numpy(), None)[0].shape == (1, 1, 128)
    assert len(list(session.stream(ids, 4))) == 4
    with pytest.raises(FolderError, match="last token's logits only"):
        session(input_ids=ids)
    if recipe == DUAL:
        assert branches(opened(tmp_path / "last"))["else_branch"]["MatMulNBits"] == 1  # one row needs no int8


def test_last_tokens_of_padded_texts():
    x = torch.arange(3 * 4, dtype=torch.float32).reshape(3, 4, 1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert last_tokens(x, mask).flatten().tolist() == [3.0, 5.0, 8.0]
    behind = torch.ones(3, 9, dtype=torch.long)  # five tokens of a cache before them
    assert last_tokens(x, behind).flatten().tolist() == [3.0, 7.0, 11.0]
    one = torch.tensor([[1, 1, 0, 0, 1]])  # a padded text that goes on, one token at a time
    assert last_tokens(torch.ones(1, 1, 1), one).shape == (1, 1, 1)


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(example=torch.randn(2, 8), last_logits=True), "for decoders"),
        (dict(example=torch.randn(2, 8), contrib_ops=False, accuracy_level=1), "cannot be written with standard operators only"),
        (dict(example=torch.randn(2, 8), accuracy_level=2), "accuracy_level 2 is unknown"),
    ],
)
def test_options_that_cannot_be_kept_are_refused_before_any_work(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "quantize", None)
    with pytest.raises(RecipeError, match=words):
        qcompile.export_onnx(nn.Sequential(nn.Linear(8, 8)), tmp_path / "m", "int8", progress=False, **options)


@pytest.mark.parametrize(
    "name,recipe",
    [("llama", "int8"), ("llama", DUAL), ("gpt2", "w8a16"), ("gemma2", "w4a16"), ("bert", "w4a16"), ("bert", DUAL)],
)
def test_a_portable_file_is_of_standard_operators(name, recipe, tmp_path):
    batch = example(name)
    more = dict(example=batch) if name == "bert" else {}
    report = qcompile.export_onnx(build(name), tmp_path / "m", recipe, [batch], contrib_ops=False, progress=False, **more)
    path = str(tmp_path / "m/model.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {""} and not model.functions
    assert report.numbers["onnx relative error"] < 1e-5
    if recipe != "int8":  # ONNX Runtime makes its own operator of them: as fast as ours
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        fused = collections.Counter(n.op_type for n in optimized.graph.node)
        assert fused["MatMulNBits"] == sum(n.op_type == "DequantizeLinear" for n in model.graph.node) > 0


def test_a_portable_file_in_another_runtime(tmp_path):
    """ONNX's own reference evaluator knows nothing but the standard."""
    from onnx.reference import ReferenceEvaluator

    model = build("llama")
    qcompile.quantize(model, "w4a16", progress=False)
    qcompile.export_onnx(model, tmp_path / "m", contrib_ops=False, progress=False)
    ids = torch.tensor([[5, 9, 17, 33], [90, 8, 51, 70]])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 4), np.int64)}
    feeds |= {
        f"past_key_values.{i}.{part}": np.zeros((2, 2, 0, 16), np.float32) for i in (0, 1) for part in ("key", "value")
    }
    logits = ReferenceEvaluator(str(tmp_path / "m/model.onnx")).run(["logits"], feeds)[0]
    assert torch.allclose(torch.from_numpy(logits), model(ids).logits, atol=1e-4)


def test_float_zero_points_are_not_portable(tmp_path):
    with pytest.raises(NoOnnxForm, match="integer zero points"):
        qcompile.export_onnx(build("llama"), tmp_path / "m", "w4a16-hqq", contrib_ops=False, progress=False)


def test_scales_are_stored_as_a_byte_for_a_group(folders):
    """And a float for a row: the operators' float scales are computed when the file is opened."""
    model, place = folders
    for name in ("both", "few"):
        graph = opened(place / name)
        kinds = {t.name: (t.data_type, len(t.dims)) for t in graph.initializer}
        products = [n for n in every(graph) if n.op_type == "MatMulNBits"]
        made = {n.output[0]: n for n in graph.node}  # not inside the branches, which share them
        for product in products:
            cast, rows = (made[part] for part in made[product.input[2]].input)
            assert kinds[cast.input[0]] == (onnx.TensorProto.INT8, 2) and kinds[rows.input[0]][1] == 1
        assert products and not any(
            kind == (onnx.TensorProto.FLOAT, 2) for name, kind in kinds.items() if "scales" in name
        )


def every(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every(attribute.g)
