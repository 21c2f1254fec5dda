"""generate() of a compiled model gives the tokens of the model itself, however it is called."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers import MistralForCausalLM as Mistral

import qcompile
from qcompile.generation.growing_cache import GrowingLayer
from qcompile.modules.kv_cache import KVCache
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError

# No codes of activations: there a last bit, which is another in a compiled graph, decides between two of them. It does
# so in a cache too, where it moves the logits by 1e-4; codes that are read as something else move them by over 1e-2.
WEIGHTS = Quantize("int4/group32/zero", None)
OPTIONS = {"verify": False, "on_slow_kernel": "quantize"}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def relative(want, got):
    """The distance between two runs, as a share of the first."""
    return float((got - want).norm() / want.norm())


@pytest.fixture(scope="module")
def models():
    """The quantized model, and the same one compiled."""
    plain = llama()
    qcompile.quantize(plain, "w4a16", progress=False, verify=False)
    compiled = copy.deepcopy(plain)
    report = qcompile.compile_for_generate(compiled, **OPTIONS)
    assert report.metrics["decode steps"] == 1 and not report.breaks
    return plain, compiled


def only_the_step(model):
    """All but the step runs eagerly: compiling it for each of many caches takes minutes."""
    assert model.forward.step is not None
    model.forward.compiled = model.forward.eager


def generated(model, ids, **options):
    torch.manual_seed(1)
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": False, "num_beams": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_the_tokens_are_the_models_own(models, options):
    ids = torch.randint(90, (1, 11), generator=torch.Generator().manual_seed(3))
    want, got = (generated(model, ids, **options) for model in models)
    assert torch.equal(got, want)


def test_several_texts_with_padding(models):
    ids = torch.randint(1, 90, (2, 7))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    want, got = (generated(model, ids, attention_mask=mask, do_sample=False) for model in models)
    assert torch.equal(got, want)


def test_a_token_is_decoded_by_the_step_into_a_cache_that_grows(models):
    plain, compiled = models
    ids = torch.randint(90, (1, 9))
    caches, found = (DynamicCache(config=plain.config), DynamicCache(config=plain.config)), []
    with torch.no_grad():
        for model, cache in zip(models, caches, strict=True):
            logits = [model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True).logits]
            for i in range(6, 9):
                logits.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
            found.append(torch.cat(logits, 1))
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert all(type(layer) is GrowingLayer for layer in caches[1].layers) and caches[1].get_seq_length() == 9
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.allclose(a.keys, b.keys, rtol=1e-4, atol=1e-5) and torch.allclose(a.values, b.values, atol=1e-5)
    shared = copy.deepcopy(caches[1])  # a prefix of two continuations
    with torch.no_grad():
        first = compiled(input_ids=ids[:, :1], past_key_values=caches[1], use_cache=True).logits
        again = compiled(input_ids=ids[:, :1], past_key_values=shared, use_cache=True).logits
    assert torch.equal(first, again)


def test_a_copy_is_a_model_that_is_not_compiled(models):
    copied, ids = copy.deepcopy(models[1]), torch.randint(90, (1, 5))
    assert copied.forward.__self__ is copied
    with torch.no_grad():
        copied.get_input_embeddings().weight.zero_()
        assert not torch.equal(copied(input_ids=ids).logits, models[0](input_ids=ids).logits)


@pytest.mark.parametrize("how", ["compile_for_generate", "compile", "compile of the forward", "wrapper"])
def test_what_reads_a_compiled_model_reads_the_model_itself(models, how, tmp_path):
    """Not the compiled call, which would be traced as a whole, or compiled again for the weights of an export."""
    plain, compiled = models[0], copy.deepcopy(models[0])
    if how == "compile_for_generate":
        compiled = models[1]
    elif how == "compile":
        compiled.compile(backend="qcompile", options=OPTIONS)
    elif how == "compile of the forward":
        compiled.forward = torch.compile(compiled.forward, backend="qcompile", options=OPTIONS)
    else:
        compiled = torch.compile(compiled, backend="qcompile", options=OPTIONS)
    example = {"input_ids": torch.randint(90, (2, 5))}
    want, got = (qcompile.capture(model, (), example) for model in (plain, compiled))
    assert [str(n.target) for n in got.graph.nodes if n.args] == [str(n.target) for n in want.graph.nodes if n.args]
    exported = qcompile.export_onnx(compiled, tmp_path / "encoder", example=example, progress=False)
    assert exported.metrics["onnx relative error"] < 1e-5
    assert len(qcompile.verify_model(compiled, example).sites) == 15
    qcompile.save(compiled, tmp_path / "saved")
    step = getattr(compiled.forward, "step", None)
    qcompile.export_onnx(compiled, tmp_path / "decoder", progress=False)
    assert getattr(compiled.forward, "step", None) is step  # not made again for the weights of an export


@pytest.mark.slow
def test_a_compiled_model_is_pickled_and_quantized_as_the_model_itself(tmp_path):
    model, example = llama(), {"input_ids": torch.randint(90, (2, 5))}
    with torch.no_grad():
        want = model(**example).logits
    qcompile.compile_for_generate(model, "int8", **OPTIONS)
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(**example).logits, want)
    assert qcompile.quantize(model, "w4a16", progress=False).passes[0].done
    generated(model, example["input_ids"][:1])


def test_what_has_no_step_says_why():
    model = llama()
    model.generation_config.use_cache = False
    with pytest.raises(RecipeError, match="on_slow_kernel"):
        qcompile.compile_for_generate(model, on_slow_kernel="never")
    with pytest.raises(TypeError, match="has no generate"):
        qcompile.compile_for_generate(torch.nn.Linear(2, 2))
    with pytest.raises(RecipeError, match="gptq"):  # needs data, which the backend has not
        qcompile.compile_for_generate(model, "w4a16-gptq")
    assert "forward" not in model.__dict__


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=90)),
        lambda: Mistral(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6)),
    ],
    ids=["positions by table", "sliding window"],
)
@pytest.mark.parametrize("recipe", ["w4a8", "w4a16"])
def test_other_models(make, recipe):
    torch.manual_seed(0)
    plain = make().eval()
    qcompile.quantize(plain, recipe, progress=False, verify=False)
    compiled = copy.deepcopy(plain)
    report = qcompile.compile_for_generate(compiled, **OPTIONS)
    assert report.metrics["decode steps"] == 1, report.breaks
    ids = torch.randint(90, (1, 9))
    assert torch.equal(generated(compiled, ids, do_sample=False), generated(plain, ids, do_sample=False))


@pytest.mark.slow
@pytest.mark.parametrize("passes", [(QuantizeKV(8),), (QuantizeKV(4, hadamard=True, sink_tokens=4),)], ids=["8", "4"])
def test_the_step_reads_codes_of_a_quantized_cache(passes):
    plain = llama()
    qcompile.quantize(plain, Recipe("kv", (*passes, WEIGHTS, Fuse())), progress=False, verify=False)
    compiled = copy.deepcopy(plain)
    report = qcompile.compile_for_generate(compiled, **OPTIONS)
    assert report.metrics["decode steps"] == 1, report.breaks
    only_the_step(compiled)
    calls = [str(node.target) for node in compiled.forward.step.program.graph.nodes if node.op == "call_function"]
    assert calls.count("qcompile_cpu.code_attention.default") == 2
    ids, logits = torch.randint(90, (1, 7)), []
    for model in (plain, compiled):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
            rest = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in (5, 6)]
        logits.append(torch.cat(rest))
        assert cache.get_seq_length() == 7
    assert relative(*logits) < 2e-3
    short = generated(compiled, ids[:, :2], do_sample=False)  # all tokens still float: not decoded by the step
    assert torch.equal(short, generated(plain, ids[:, :2], do_sample=False))


@pytest.mark.slow
def test_a_cache_of_the_caller_that_means_something_else_is_read_as_it_is():
    """Codes of other bits, other rotations or other centers have the shapes of those that the step reads, or nearly."""
    plain, ids = llama(), torch.randint(90, (1, 8))
    qcompile.quantize(plain, Recipe("kv", (QuantizeKV(8), WEIGHTS, Fuse())), progress=False, verify=False)
    compiled = copy.deepcopy(plain)
    qcompile.compile_for_generate(compiled, **OPTIONS)
    only_the_step(compiled)
    others = KVCache(8), KVCache(4), KVCache(8, hadamard=True), KVCache(8, centers=[torch.randn(2, 16)] * 2)
    for own in (*others, KVCache(8, sink_tokens=2), DynamicCache(config=plain.config)):
        logits = []
        for model in (plain, compiled):
            cache = copy.deepcopy(own)
            with torch.no_grad():
                model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
                step = [model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True) for i in (6, 7)]
            logits.append(torch.cat([out.logits for out in step]))
        assert relative(*logits) < 2e-3, type(own).__name__


def test_a_cache_with_static_scales_has_no_step():
    model, batch = llama(), {"input_ids": torch.randint(90, (2, 9))}
    recipe = Recipe("kv", (QuantizeKV(8, static=True), Quantize(), Fuse()))
    qcompile.quantize(model, recipe, [batch], progress=False, verify=False)
    report = qcompile.compile_for_generate(model, **OPTIONS)
    assert report.metrics["decode steps"] == 0 and "static scales" in report.breaks[0]


@pytest.mark.slow
def test_weights_that_change_are_seen():
    plain, ids = llama(), torch.randint(90, (1, 9))
    qcompile.quantize(plain, "w4a16", progress=False, verify=False)
    compiled = copy.deepcopy(plain)
    qcompile.compile_for_generate(compiled, **OPTIONS)
    only_the_step(compiled)
    for _ in range(2):
        assert torch.equal(generated(compiled, ids, do_sample=False), generated(plain, ids, do_sample=False))
        for model in (plain, compiled):
            with torch.no_grad():
                model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.flip(0))
    assert compiled.forward.step is not None


@pytest.mark.slow
def test_a_float_model_with_a_recipe_in_bfloat16():
    model = llama().bfloat16()
    report = qcompile.compile_for_generate(model, "int8", **OPTIONS)
    assert report.metrics["decode steps"] == 1 and any(site.kernel for site in report.sites)
    assert generated(model, torch.randint(90, (1, 9)), do_sample=False).shape == (1, 21)
