"""The real small LLM: what the README claims, on the text that every checkout has."""

from __future__ import annotations

import copy

import pytest
import torch

import qcompile
from qcompile.api.verify_model import verify_model
from qcompile.backend.dynamo import reports
from qcompile.calibration.text import batches, embedded_text, windows
from qcompile.evaluation.perplexity import perplexity
from qcompile.generation.pretrained import load_encoder
from qcompile.modules.kv_cache import KVCache
from qcompile.numerics.format import Format
from qcompile.passes import GPTQ, Fuse, Quantize
from qcompile.recipe.recipe import Recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pieces(smollm2):
    return windows(smollm2[1], embedded_text(), length=512, count=2)


@pytest.fixture(scope="module")
def float_perplexity(smollm2, pieces):
    return perplexity(smollm2[0], pieces, progress=False)


@pytest.mark.parametrize("recipe,most", [("int8", 1.06), ("w8a16", 1.01), ("int8-rotated", 1.04), ("w4a16", 1.8)])
def test_perplexity(smollm2, pieces, float_perplexity, recipe, most):
    model = copy.deepcopy(smollm2[0])
    report = qcompile.quantize(model, recipe, progress=False)
    assert perplexity(model, pieces, progress=False) < most * float_perplexity
    assert all(s.quantized for s in report.sites) and len(report.sites) == 211
    assert report.seconds < 600  # a hang, not a speed: speeds are measured in benches/


def test_a_quantized_cache(smollm2, pieces, float_perplexity):
    """Four bits lose little, a Hadamard matrix wins most of it back, and the cache takes a quarter."""
    found, sizes = {}, {}
    for name, options in (("plain", {}), ("hadamard", {"hadamard": True})):
        caches = []

        def call(input_ids, options=options, caches=caches):
            caches.append(KVCache(4, **options))
            return smollm2[0](input_ids=input_ids, past_key_values=caches[-1])

        found[name] = perplexity(call, pieces, progress=False)
        sizes[name] = caches[0].nbytes / caches[0].float_nbytes()
    assert float_perplexity < found["hadamard"] < found["plain"] < 1.3 * float_perplexity
    assert found["hadamard"] < 1.1 * float_perplexity and sizes["hadamard"] < 0.35


def test_rotation_rescues_w4a4(smollm2, pieces):
    found = {}
    for recipe in ("w4a4", "w4a4-rotated"):
        model = copy.deepcopy(smollm2[0])
        qcompile.quantize(model, recipe, progress=False)
        found[recipe] = perplexity(model, pieces[:1], progress=False)
    assert found["w4a4"] > 20 * found["w4a4-rotated"]


def test_every_exact_pass_holds_in_float64(smollm2):
    report = verify_model(smollm2[0], batches(smollm2[1], length=16, count=1)[0])
    assert {c.name for c in report.certificates} == {"Untie", "FoldNorm", "Rotate", "OnlineHadamard"}
    assert all(c.error <= 1e-9 and c.dtype == "float64" for c in report.certificates)


def test_eager_compiled_and_onnx_choose_the_same_tokens(smollm2, tmp_path):
    from qcompile.generation.onnx_session import Session

    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    qcompile.quantize(model, "w4a16", progress=False)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    want = greedy(model, ids)
    # Level 1: level 4 rounds activations to int8, another function, whose tokens differ at near ties.
    qcompile.export_onnx(model, tmp_path / "m", tokenizer=tokenizer, accuracy_level=1, progress=False)
    assert list(Session(tmp_path / "m").stream(ids, len(want))) == want
    shorten(model)
    want = greedy(model, ids)
    model.compile(backend="qcompile", dynamic=True)  # two graphs to compile, not three
    assert greedy(model, ids) == want
    kernels = {k for report in reports for s in report.sites for k in s.kernel.values()}
    assert any("table_linear" in k for k in kernels)


def test_eager_and_compiled_round_activations_alike(smollm2):
    """Both round the same values, but not always to the same side, and one code that flips is new noise for all
    later layers: a change of 1e-7 in each layer moves eager logits by up to a tenth of their norm. So the median
    over tokens is compared, of a prompt and of single steps, with what the rounding itself does to float logits."""
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    shorten(model)
    text = "The capital of France is Paris. It is a large city on the river Seine, and its people"
    ids = tokenizer(text, return_tensors="pt").input_ids
    exact = read_in_steps(model, ids)
    qcompile.quantize(model, "int8", progress=False)
    eager = read_in_steps(model, ids)
    model.compile(backend="qcompile", dynamic=True)
    compiled = read_in_steps(model, ids)
    assert any("int8_linear" in k for report in reports for s in report.sites for k in s.kernel.values())
    for of_prompt in (slice(0, 12), slice(12, None)):
        moved = distances(compiled[of_prompt], eager[of_prompt]).median()
        assert moved < 0.4 * distances(eager[of_prompt], exact[of_prompt]).median()


def read_in_steps(model, ids, prompt=12):
    """Logits [T, V] of a prompt read at once and then token by token, with a cache."""
    with torch.no_grad():
        found = model(ids[:, :prompt], use_cache=True)
        rows = [found.logits[0]]
        for token in ids[0, prompt:]:
            found = model(token.view(1, 1), past_key_values=found.past_key_values, use_cache=True)
            rows.append(found.logits[0])
    return torch.cat(rows)


def distances(found, want):
    """How far each row is from another's, as a share of the other's spread."""
    return (found - want).std(-1) / want.std(-1)


def shorten(model):
    """Keep the first eight layers and the last four: Inductor takes seconds for each (`make demo` compiles all)."""
    del model.model.layers[8:-4]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)


def greedy(model, ids):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def sentences():
    """A sentence encoder in true float32, forty sentences of the embedded text, and forty others to calibrate on."""
    model, read = load_encoder()
    text = embedded_text().replace("\n", " ").split(". ")
    chosen = [s for s in text if 40 < len(s) < 200][:80]
    tokens, others = (dict(read(chosen[i::2], padding=True, return_tensors="pt")) for i in (0, 1))
    return model, tokens, others


def embeddings(model, tokens):
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize(
    "recipe,least",
    [
        ("int8", 0.997),
        ("int8-zero", 0.998),  # the inputs after GELU have one sign
        ("w8a16", 0.9995),
        (Recipe("g32", (Quantize(Format.parse("int4/group32/zero"), None, lm_head=None, clip=True), Fuse())), 0.97),
        (Recipe("g32-gptq", (GPTQ(Format.parse("int4/group32/zero"), None, lm_head=None, clip=True), Fuse())), 0.99),
    ],
)
def test_sentence_embeddings(sentences, recipe, least):
    model, tokens, others = sentences
    want = embeddings(model, tokens)
    quantized = copy.deepcopy(model)
    report = qcompile.quantize(quantized, recipe, [others], progress=False)
    assert not report.skipped
    similarity = (embeddings(quantized, tokens) * want).sum(-1)
    print(report.recipe, float(similarity.mean()), float(similarity.min()))
    assert float(similarity.mean()) >= least
