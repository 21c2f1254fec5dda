"""Int8 KV caches in exported folders; those with per-token scales are refused, for a reason that still holds."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_nodes import bend, every_node
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
from zoo import build, example

import qcompile
from qcompile.api import export_onnx
from qcompile.codegen.onnx import export_module
from qcompile.codegen.onnx.lowering import int8_kv_attention
from qcompile.codegen.onnx.lowering.int8_kv_attention import DECODE_TOKENS
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.generation import onnx_session
from qcompile.generation.onnx_session import Session
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError

INT4, DUAL = Format.parse("int4/group32/zero"), Format.parse("int4/group32/dual")
WEIGHTS = (QuantizeKV(8, static=True), Quantize(INT4, None), Fuse())
ROUNDED = 0.02  # what activations in int8 change of these models' logits, and a little
BOTH = (QuantizeKV(8, static=True), Quantize(DUAL, Format("int8")), Fuse())


def ids(length, rows=1, seed=0):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def quantized(name, passes=WEIGHTS):
    model = build(name)
    model.was_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    qcompile.quantize(model, Recipe("kv", passes), [{"input_ids": ids(32, 4, 1)}], progress=False)
    return model


def exported(model, folder, **options):
    """A session of the exported model, whose embeddings become those of the file: of one table with the logits."""
    qcompile.export_onnx(model, folder, accuracy_level=1, progress=False, **options)
    if model.was_tied:
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(model.get_output_embeddings().weight)
    return Session(folder)


def read_in_pieces(session, text, lengths):
    """Logits of a text that is read in pieces, and the cache."""
    cache, found, start = None, [], 0
    for length in lengths:
        logits, cache = session.step(text[:, start : start + length].numpy(), cache)
        found.append(torch.from_numpy(logits))
        start += length
    return torch.cat(found, 1), cache


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt2", "phi3", "falcon", "opt", "gemma2", "bloom"])
def test_one_by_one_the_file_is_the_module_and_a_prompt_is_as_near_as_rounding(name, tmp_path):
    """Biases, norms of keys, heads that share one key, no rotation at all; a soft cap, windows, a bias of places."""
    model, text = quantized(name), ids(20)
    session = exported(model, tmp_path / "m")
    with torch.no_grad():
        want = model(input_ids=text).logits
        model.qcompile_calls.enabled = False
        effect = relative(want, model(input_ids=text).logits)
    single, codes = read_in_pieces(session, text, [1] * 20)
    assert relative(single, want) < 1e-4 < effect, "the cache must matter, and be the module's"
    for pieces in ([20], [DECODE_TOKENS + 1, 1, 14], [DECODE_TOKENS, 9, 7], [15, DECODE_TOKENS, 1]):
        logits, cache = read_in_pieces(session, text, pieces)
        assert relative(logits, want) < 1.5 * effect
        for one, other in zip(cache[:2], codes[:2], strict=True):  # the first layer reads what both know exactly
            assert one.dtype == np.int8 and np.abs(one.astype(int) - other).max() <= 1
            assert (one != other).mean() < 0.01, "ties at most"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"low_memory": True}])
def test_products_with_two_kernels(options, tmp_path):
    """Decode and prefill, one text and two: which branch of products meets which of attention."""
    model = quantized("llama", BOTH)
    session = exported(model, tmp_path / "m", **options)
    for rows, cuts in (
        (2, ([20], [17, 1, 1, 1], [2] + [1] * 18)),
        (1, ([9, 9, 1, 1], [3, DECODE_TOKENS, 13], [DECODE_TOKENS + 1, 15])),
    ):
        text = ids(20, rows)
        with torch.no_grad():
            want = model(input_ids=text).logits
            model.qcompile_calls.enabled = False
            effect = relative(want, model(input_ids=text).logits)
            model.qcompile_calls.enabled = True
        for pieces in cuts:
            # Products by 4-bit codes do not quantize activations, which the module always does.
            assert relative(read_in_pieces(session, text, pieces)[0], want) < 1.5 * effect + ROUNDED


@pytest.mark.slow
@pytest.mark.parametrize("passes", [WEIGHTS, BOTH], ids=["weights", "both"])
@pytest.mark.parametrize("new", [1, DECODE_TOKENS, DECODE_TOKENS + 1, 9])
def test_a_cache_is_extended_in_the_buffer_that_it_came_in(passes, new, tmp_path):
    """As onnxruntime-genai does: a buffer of the greatest length is input and output."""
    model, text = quantized("qwen2", passes), ids(12 + new)
    session = exported(model, tmp_path / "m")
    with torch.no_grad():
        whole = model(input_ids=text).logits[:, 12:]
    _, past = session.step(text[:, :12].numpy(), None)
    want, grown = session.step(text[:, 12:].numpy(), past)
    binding = session.session.io_binding()
    rest = text[:, 12:].numpy()
    binding.bind_cpu_input("input_ids", rest)
    binding.bind_cpu_input("attention_mask", mask := np.ones((1, 12 + new), np.int64))
    buffers = []
    for entry, part in zip(session.past_inputs, past, strict=True):
        room = np.full((1, part.shape[1], 40, part.shape[3]), 77, np.int8)
        room[:, :, :12] = part
        buffers.append(onnxruntime.OrtValue.ortvalue_from_numpy(room))
        binding.bind_ortvalue_input(entry.name, buffers[-1])
        binding.bind_ortvalue_output(entry.name.replace("past_key_values", "present"), buffers[-1])
    binding.bind_output("logits")
    session.session.run_with_iobinding(binding)
    got = binding.get_outputs()[-1].numpy()
    assert np.allclose(got, want, atol=1e-4) and mask.shape[1] == 12 + new
    assert relative(torch.from_numpy(got), whole) < 0.02 + (ROUNDED if passes is BOTH else 0), "the module's"
    for buffer, codes in zip(buffers, grown, strict=True):
        assert (np.abs(buffer.numpy()[:, :, : 12 + new].astype(int) - codes) <= 1).all()
        assert (buffer.numpy()[:, :, 12 + new :] == 77).all(), "what lies behind is not the attention's"


@pytest.mark.parametrize("passes", [WEIGHTS, BOTH], ids=["weights", "both"])
def test_an_int8_cache_runs_in_onnxruntime_genai(passes, tmp_path):
    """A short prompt and a long one, one text and two."""
    import onnxruntime_genai as genai

    session = exported(quantized("qwen2", passes), tmp_path / "m")
    folder = genai.Model(str(tmp_path / "m"))
    for length, rows in ((3, 1), (11, 1), (3, 2), (11, 2)):
        prompt = ids(length, rows).numpy()
        logits, cache = session.step(prompt, None)
        parameters = genai.GeneratorParams(folder)
        parameters.set_search_options(max_length=length + 9, min_length=length + 9, batch_size=rows)
        generator = genai.Generator(folder, parameters)
        generator.append_tokens(prompt.astype(np.int32))
        for _ in range(8):
            got = torch.from_numpy(np.array(generator.get_logits()))[:, -1:]
            assert relative(got, torch.from_numpy(logits[:, -1:])) < 0.01, "but for codes that fall to the other side"
            generator.generate_next_token()
            chosen = np.array([[generator.get_sequence(i)[-1]] for i in range(rows)], np.int64)
            logits, cache = session.step(chosen, cache)


def test_a_chat_goes_on_in_onnxruntime_genai(tmp_path):
    """A second text behind what was generated: few tokens, then many.

    onnxruntime-genai 0.18 never reads the last generated token where a text goes on, in the folders of its own model
    builder either: so it is taken back and given again.
    """
    import onnxruntime_genai as genai

    session = exported(quantized("qwen2"), tmp_path / "m")
    parameters = genai.GeneratorParams(folder := genai.Model(str(tmp_path / "m")))
    parameters.set_search_options(max_length=50, min_length=50)
    generator = genai.Generator(folder, parameters)
    text, cache = ids(7).numpy(), None
    for length in (3, 12, 1):
        generator.append_tokens(text.astype(np.int32))
        logits, cache = session.step(text, cache)
        for _ in range(2):
            got = torch.from_numpy(np.array(generator.get_logits()))[:, -1:]
            assert relative(got, torch.from_numpy(logits[:, -1:])) < 1e-3
            generator.generate_next_token()
            chosen = np.array([[generator.get_sequence(0)[-1]]], np.int64)
            logits, cache = session.step(chosen, cache)
        cache = [part[:, :, :-1] for part in cache]
        generator.rewind_to(len(generator.get_sequence(0)) - 1)
        text = np.concatenate([chosen, ids(length, seed=length).numpy()], 1)


def test_a_prompt_is_multiplied_over_floats(tmp_path):
    qcompile.export_onnx(quantized("llama"), tmp_path / "m", progress=False)
    graph = onnx.load(str(tmp_path / "m/model.onnx"), load_external_data=False).graph
    choices = [node for node in graph.node if node.op_type == "If"]
    assert len(choices) == 2 and not any(node.op_type == "GroupQueryAttention" for node in graph.node)
    for choice in choices:
        kinds = {
            branch.name: {
                a.name for n in every_node(branch.g.node) if n.op_type == "GroupQueryAttention" for a in n.attribute
            }
            for branch in choice.attribute
        }
        assert "kv_cache_bit_width" in kinds["then_branch"]
        assert "num_heads" in kinds["else_branch"] and "kv_cache_bit_width" not in kinds["else_branch"]


@pytest.mark.parametrize("bent, operator", [("scaled_value", "Mul"), ("scaled_key", "Mul"), ("past_key", "Add")])
def test_a_wrong_prefill_is_not_exported(bent, operator, tmp_path, monkeypatch):
    """The nodes around the attention over floats are verified too."""
    bend(monkeypatch, int8_kv_attention, bent, operator)
    with pytest.raises(ExportMismatch):
        qcompile.export_onnx(quantized("llama"), tmp_path / "m", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_has_no_such_attention(tmp_path):
    """A rotary embedding of four channels, which GroupQueryAttention does not take."""
    with pytest.raises(OnnxUnsupportedError, match="QuantizeKV: .* rotary embedding of 4 channels.*float_cache"):
        qcompile.export_onnx(model := quantized("gpt_neox"), tmp_path / "m", progress=False)
    qcompile.export_onnx(model, tmp_path / "float", float_cache=True, progress=False)
    optional = quantized("gpt_neox", (QuantizeKV(8, static=True, optional=True), *WEIGHTS[1:]))
    report = qcompile.export_onnx(optional, tmp_path / "optional", progress=False)
    assert any(place.site == "cache" and "stays float32" in place.reason for place in report.passes[-1].skipped)
    for folder in ("float", "optional"):
        assert Session(tmp_path / folder).cache_dtype == np.float32


@pytest.mark.slow
def test_a_float_cache_where_it_is_requested(tmp_path):
    model = quantized("llama", (QuantizeKV(8, static=True, optional=True), *WEIGHTS[1:]))
    model.qcompile_calls.enabled = False
    with torch.no_grad():
        want = model(input_ids=(text := ids(9))).logits
    model.qcompile_calls.enabled = True
    for options in ({"float_cache": True}, {"contrib_ops": False}):
        report = qcompile.export_onnx(model, folder := tmp_path / next(iter(options)), progress=False, **options)
        session = Session(folder)
        assert session.cache_dtype == np.float32
        assert relative(read_in_pieces(session, text, [5, 1, 1, 1, 1])[0], want) < 0.02, (
            "the module's without its cache"
        )
        assert [place.reason for place in report.passes[-1].skipped if place.site == "cache"] == [
            "stays float32, as requested, or as files of this kind have it"
        ]
    tokens = build("llama")
    qcompile.quantize(tokens, "kv4", progress=False)
    qcompile.export_onnx(tokens, tmp_path / "kv4", float_cache=True, progress=False)
    with pytest.raises(RecipeError, match="file of an encoder .* has no cache"):
        qcompile.export_onnx(build("bert"), tmp_path / "b", "kv8-fixed", [example("bert")], example=example("bert"))
    with pytest.raises(RecipeError, match="contrib_ops=False.* has a float cache"):
        qcompile.export_onnx(quantized("llama"), tmp_path / "m", contrib_ops=False, progress=False)


def test_a_quantized_cache_is_refused_before_any_work(tmp_path, monkeypatch):
    model = build("llama")
    own = build("llama")
    qcompile.quantize(own, "kv4", [example("llama")], progress=False)
    monkeypatch.setattr(export_onnx, "quantize", None)
    monkeypatch.setattr(export_module, "export_module", None)
    for module, recipe in ((model, "kv8"), (model, Recipe("mine", (QuantizeKV(8),))), (own, None), (own, "w4a16")):
        with pytest.raises(RecipeError, match="static scales only .* without zero points"):
            qcompile.export_onnx(module, tmp_path / "m", recipe, [example("llama")], progress=False)
    assert not list(tmp_path.iterdir())


def test_the_reason_still_holds():
    """When this fails, ONNX Runtime can do more: look whether it is what QuantizeKV computes."""
    (schema,) = [s for s in get_all_operator_schema() if s.name == "GroupQueryAttention"]
    inputs = {formal.name for formal in schema.inputs}
    assert {"k_scale", "v_scale"} <= inputs and not any("zero" in name for name in inputs)
    assert "'PER_TENSOR', 'PER_CHANNEL'" in schema.attributes["k_quant_type"].description


def test_perplexity_is_that_of_the_codes(tmp_path):
    """A window is read in pieces: scales that are far too coarse must show."""
    model, text = quantized("qwen2"), ids(60)
    with torch.no_grad():
        want = model(input_ids=text).logits
    session = exported(model, tmp_path / "m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_session, "PREFILL_CHUNK", 20)
        fine = session(input_ids=text)
        for pair in model.qcompile_scales.all:
            for part in pair:
                part.mul_(30)
        coarse = exported(model, tmp_path / "coarse")(input_ids=text)
    assert relative(fine, want) < 0.3 * relative(coarse, want)
