"""IntactKV: exact without quantization, better with it, through calls, generate() and checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture
from qcompile.modules.kv_cache import KVCache
from qcompile.numerics.format import Format
from qcompile.passes import FoldNorm, Fuse, IntactKV, Quantize, QuantizeKV, Rotate, SmoothAttention, Untie
from qcompile.passes.kv_cache.intact_kv import intact_kv
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError

PREFIX = (1, 7, 9)
IDS = torch.tensor([[*PREFIX, 20, 33, 41, 8], [*PREFIX, 99, 5, 61, 27]])
DECODERS = ["llama", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "bloom", "mixtral"]
INT4 = Quantize(Format.parse("int4/group32/zero"), None, lm_head=None)
INT3 = Quantize(Format.parse("int3/group32/zero"), None, lm_head=None)


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


class Reader(nn.Module):
    """Tokens, one attention, logits; heads as [B, H, T, D], with keys transposed, or folded into rows."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.table, self.parts = layout, nn.Embedding(20, 12), nn.Linear(12, 36)
        self.head = nn.Linear(12, 20)

    def heads(self, ids):
        return [p.unflatten(-1, (3, 4)).transpose(1, 2) for p in self.parts(self.table(ids)).split(12, -1)]

    def forward(self, ids):
        q, k, v = self.heads(ids)
        if self.layout == "folded":
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        if self.layout == "fused":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = torch.softmax((q @ k.transpose(-1, -2)).masked_fill(hidden, -1e9), -1) @ v
        y = y.unflatten(0, (-1, 3)) if self.layout == "folded" else y
        return self.head(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layout", ["fused", "decomposed", "folded"])
def test_the_prefix_is_what_the_program_computes(layout):
    torch.manual_seed(0)
    model = Reader(layout).requires_grad_(False)
    program = capture(model, (torch.randint(0, 20, (2, 6)),))
    prefix = intact_kv(program, IntactKV(PREFIX), PassContext.of(program)).constants.prefix
    ids = torch.tensor([PREFIX])
    _, k, v = model.heads(ids)
    assert prefix.ids.tolist() == list(PREFIX)
    for found, want in ((*prefix.keys, k), (*prefix.values, v), (prefix.logits, model(ids))):
        assert found.shape == want.shape and torch.allclose(found, want, atol=1e-6)


def test_programs_of_other_inputs_are_refused():
    for model, inputs in ((nn.Linear(4, 4), (torch.randn(2, 4),)), (Beside(), (torch.ones(2, 4).long(),) * 2)):
        program = capture(model, inputs)
        with pytest.raises(RecipeError, match="the model must take token ids alone"):
            intact_kv(program, IntactKV(PREFIX), PassContext.of(program))
    program = capture(Reader("fused"), (torch.randint(0, 20, (2, 6)),))
    with pytest.raises(RecipeError, match="names no beginning-of-sequence token"):
        intact_kv(program, IntactKV(), PassContext.of(program))


class Beside(nn.Module):
    """Two inputs of ids."""

    def forward(self, ids, more):
        return ids + more


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_without_quantization_nothing_changes(name):
    """Also after rewritings that change the bases of keys and values."""
    model = build(name)
    want = logits(model)
    exact = (Untie(), SmoothAttention(), Rotate(stream=False), IntactKV(PREFIX))
    qcompile.quantize(model, Recipe("exact", exact), [example(name)], progress=False)
    assert model.qcompile_prefix.layers == 2
    assert relative_error([logits(model)], [want]) < 2e-5
    assert relative_error([logits(model, use_cache=False)], [want]) < 2e-5


def test_a_text_that_differs_from_the_prefix_in_its_last_token_is_another_text():
    model = build("llama")
    qcompile.quantize(model, Recipe("exact", (Untie(), IntactKV(PREFIX))), [example("llama")], progress=False)
    ids = torch.tensor([[*PREFIX[:-1], PREFIX[-1] + 1, 11, 12]])
    assert relative_error([logits(model, ids)], [logits(build("llama"), ids)]) < 2e-5


@pytest.mark.slow
def test_the_prefix_is_the_float_models_and_the_rest_gets_better():
    total = [0.0, 0.0]
    for seed in range(6):
        ids = torch.randint(3, 128, (1, 12), generator=torch.manual_seed(seed))
        want, prefix = logits(build("llama"), ids), tuple(ids[0, :9].tolist())
        for index, passes in enumerate(((INT3, Fuse()), (IntactKV(prefix), INT3, Fuse()))):
            model = build("llama")
            qcompile.quantize(model, Recipe("q", passes), [example("llama")], progress=False)
            got = logits(model, ids)
            total[index] += float((got - want)[:, 9:].square().mean())
        assert torch.allclose(got[:, :9], want[:, :9], atol=1e-5)
    assert total[1] < 0.9 * total[0], total


@pytest.mark.slow
def test_generate_starts_behind_the_prefix_and_a_checkpoint_keeps_it(tmp_path):
    model = build("llama")
    recipe = Recipe("q", (IntactKV(PREFIX), QuantizeKV(4), Quantize(), Fuse()))
    qcompile.quantize(model, recipe, progress=False)
    done = model.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    cache = done.past_key_values
    assert isinstance(cache, KVCache) and cache.get_seq_length() == 10
    assert torch.equal(cache.layers[0].own_keys.sinks.read()[0], model.qcompile_prefix.keys0[0])
    assert relative_error([done.logits[0]], [logits(model)[:, -1]]) < 1e-5
    qcompile.save(model, tmp_path / "m")
    loaded = qcompile.load(tmp_path / "m")
    assert relative_error([logits(loaded)], [logits(model)]) < 1e-6
    assert torch.equal(loaded.generate(IDS, max_new_tokens=4, do_sample=False), done.sequences)


@pytest.mark.slow
def test_an_exported_folder_starts_behind_the_prefix(tmp_path):
    from qcompile.generation.onnx_session import Session

    model = build("llama")
    qcompile.quantize(model, Recipe("q", (IntactKV(PREFIX), INT4, Fuse())), progress=False)
    qcompile.export_onnx(model, tmp_path / "o", accuracy_level=1, progress=False)
    with torch.no_grad():  # the file has one table for both, of codes
        model.get_input_embeddings().weight.copy_(model.get_output_embeddings().weight)
    assert torch.equal(model(input_ids=IDS).logits, logits(model)), "the hooks are back"
    session = Session(tmp_path / "o")
    assert relative_error([session(input_ids=IDS)], [logits(model)]) < 1e-3
    first = model.generate(IDS[:1], max_new_tokens=3, do_sample=False)[0, IDS.shape[1] :].tolist()
    assert list(session.stream(IDS[:1], 3)) == first
    other = torch.randint(3, 128, (1, 6))
    assert relative_error([session(input_ids=other)], [logits(model, other)]) < 1e-3


def test_a_quantized_cache_has_no_onnx_form(tmp_path):
    model = build("llama")
    with pytest.raises(RecipeError, match="QuantizeKV"):
        qcompile.export_onnx(model, tmp_path / "o", Recipe("q", (QuantizeKV(), INT4, Fuse())), progress=False)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_other_texts_are_computed_as_without_it():
    ids = torch.randint(3, 128, (2, 8))
    plain, intact = build("llama"), build("llama")
    qcompile.quantize(plain, Recipe("q", (INT3, Fuse())), progress=False)
    qcompile.quantize(intact, Recipe("q", (IntactKV(PREFIX), INT3, Fuse())), progress=False)
    assert torch.equal(logits(plain, ids), logits(intact, ids))
    assert not torch.equal(logits(plain), logits(intact))


def test_the_models_own_token_is_the_default():
    model = build("llama")
    qcompile.quantize(model, Recipe("q", (IntactKV(), Quantize(), Fuse())), progress=False)
    assert model.qcompile_prefix.ids.tolist() == [model.config.bos_token_id]


@pytest.mark.parametrize(
    "name,passes,words",
    [
        ("vit", (IntactKV((1,)), Quantize(), Fuse()), "puts nothing into (cache|past_key_values)"),
        ("llama", (Quantize(), IntactKV((1,)), Fuse()), "Quantize must come after IntactKV"),
        ("llama", (IntactKV((1,)), Untie(), FoldNorm(), Rotate(), Quantize(), Fuse()), "must come after"),
    ],
)
def test_bad_recipes_are_refused(name, passes, words):
    model = build(name)
    with pytest.raises((RecipeError, CalibrationError), match=words):
        qcompile.quantize(model, Recipe("q", passes), [example(name)], progress=False)


def test_what_is_no_token_is_refused():
    for token in (-1, "a", 1.5):
        with pytest.raises(RecipeError, match="token ids"):
            IntactKV((token,))
