"""Calls of a quantized model get the cache of its recipe, after loading too."""

from __future__ import annotations

import threading

import pytest
import torch
from zoo import build

import qcompile
from qcompile.modules.generation_hooks import attach, detached, hooks_of, refuse_cache
from qcompile.modules.kv_cache import KVCache
from qcompile.modules.kv_constants import CENTERS, SCALES, Centers, Prefix, Scales
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError


def test_generate_uses_the_cache_and_a_checkpoint_keeps_it(tmp_path):
    model = build("llama")
    qcompile.quantize(model, Recipe("kv", (QuantizeKV(8), Quantize(), Fuse())), progress=False)
    ids = torch.randint(3, 128, (1, 6))
    done = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(done.past_key_values, KVCache) and done.past_key_values.get_seq_length() == 10
    qcompile.save(model, tmp_path / "m")
    again = qcompile.load(tmp_path / "m").generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(again.past_key_values, KVCache) and torch.equal(again.sequences, done.sequences)
    mine = KVCache(4)
    model.generate(ids, max_new_tokens=2, do_sample=False, past_key_values=mine)
    assert mine.get_seq_length() == 7, "the caller's own cache must be used"


@pytest.mark.parametrize(
    "name, constants", [(CENTERS, Centers([torch.ones(2, 16)])), (SCALES, Scales([(torch.ones(2, 16),) * 2]))]
)
def test_what_the_cache_needs_is_where_the_model_is(name, constants):
    model = build("llama").to("meta")
    attach(model, Recipe("kv", (QuantizeKV(8),)), constants=constants)
    assert {buffer.device.type for buffer in model.get_submodule(name).buffers()} == {"meta"}


def test_an_exporter_sees_a_model_without_hooks():
    model, ids = build("llama"), torch.randint(3, 128, (1, 6))
    attach(model, Recipe("kv", (QuantizeKV(8),)))
    with pytest.raises(RuntimeError), detached(model) as hooks:
        assert hooks is hooks_of(model) and not hooks.enabled
        with torch.no_grad():
            assert not isinstance(model(ids, use_cache=True).past_key_values, KVCache)
        raise RuntimeError
    with torch.no_grad():
        assert isinstance(model(ids, use_cache=True).past_key_values, KVCache)


def test_two_threads_call_a_model_with_a_prefix():
    """One text begins with the prefix and one does not; both calls are in the model at once."""
    model = build("llama")
    start, other = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[9, 8, 7, 6, 5]])
    with torch.no_grad():
        done = model(start[:, :2], use_cache=True)
        want = [model(ids).logits for ids in (start, other)]
    layers = [(layer.keys, layer.values) for layer in done.past_key_values.layers]
    attach(model, Recipe("prefix", ()), Prefix(start[0, :2], layers, done.logits))
    both_inside, got = threading.Barrier(2, timeout=20), {}
    handle = model.get_submodule("model").register_forward_hook(lambda *_: (both_inside.wait(), None)[1])

    def call(index, ids):
        for _ in range(3):
            with torch.no_grad():
                got.setdefault(index, []).append(model(ids).logits)

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate((start, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for index, expected in enumerate(want):
        assert [logits.shape for logits in got[index]] == [expected.shape] * 3
        assert all(torch.allclose(logits, expected, atol=1e-5) for logits in got[index])


def test_a_cache_that_began_with_the_prefix_is_continued_without_it():
    model, ids = build("llama"), torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        done, want = model(ids[:, :2], use_cache=True), model(ids).logits
        layers = [(layer.keys, layer.values) for layer in done.past_key_values.layers]
        attach(model, Recipe("prefix", ()), Prefix(ids[0, :2], layers, done.logits))
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values)
        hooks = model.qcompile_calls
        with detached(model), detached(model):
            assert not hooks.enabled
        assert hooks.enabled
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), want, atol=1e-5)


def test_a_model_without_hooks_has_hooks_that_give_nothing():
    model = build("mlp")
    with detached(model) as hooks:
        assert hooks.config is None and hooks.prefix is None
    attach(model, Recipe("x", (Quantize(), Fuse())))
    assert not hasattr(model, "qcompile_calls")


@pytest.mark.parametrize(
    "config,kind,words",
    [
        (QuantizeKV(4), {}, "has no form in ONNX.*Fix: use QuantizeKV.8, static=True."),
        (QuantizeKV(8, static=True), {"encoder": True}, "an encoder .example=... has no cache. Fix: drop QuantizeKV"),
        (QuantizeKV(8, static=True, fp8="head"), {}, "codes are e4m3.*reads int8. Fix: use QuantizeKV.8, static=True."),
        (
            QuantizeKV(8, static=True),
            {"contrib_ops": False},
            "has a float cache.*Fix: drop QuantizeKV, or allow contrib_ops",
        ),
    ],
)
def test_caches_that_no_file_can_have_are_refused(config, kind, words):
    given = {"contrib_ops": True, "encoder": False, **kind}
    recipe, model = Recipe("kv", (config,)), build("llama")
    with pytest.raises(RecipeError, match=words):
        refuse_cache(model, recipe, **given)
    attach(model, recipe)
    with pytest.raises(RecipeError, match=words):
        refuse_cache(model, None, **given)


@pytest.mark.parametrize("kind", [{}, {"encoder": True}, {"contrib_ops": False}])
def test_an_optional_cache_is_never_refused(kind):
    given = {"contrib_ops": True, "encoder": False, **kind}
    refuse_cache(build("llama"), Recipe("kv", (QuantizeKV(8, static=True, optional=True),)), **given)
    refuse_cache(build("llama"), None, **given)
