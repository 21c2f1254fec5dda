"""Scales of an fp8 cache: transformers with compressed-tensors reads them, and rounds keys and values with them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from served_models import decoder, ids
from transformers.cache_utils import DynamicCache

import qcompile
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.kv_cache_scales import cache_layout, stores_cache
from qcompile.modules.cache_argument import cache_name
from qcompile.modules.cache_argument import with_cache as name_cache
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe

W4 = Quantize("int4/group32/bf16", None, keep_lm_head=True, clip=True)


def with_cache(per, dtype=torch.float32):
    model = decoder(dtype)
    passes = (QuantizeKV(8, static=True, fp8=per), W4, Fuse())
    qcompile.quantize(model, Recipe("kv", passes), [ids()], progress=False)
    return model


class OtherCache(DynamicCache):
    """A float cache of the caller's own."""


@pytest.fixture
def readable_cache(monkeypatch):
    """compressed-tensors 0.20 finds the cache of an attention by its older name, and ignores scales beside a newer."""
    if cache_name() == "past_key_values":
        return
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    original = attention.forward

    def forward(self, *args, cache=None, past_key_values=None, **kwargs):
        if past_key_values is not None:
            past_key_values.add_past_key_values(cache)
        return original(self, *args, cache=cache if past_key_values is None else past_key_values, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)


@pytest.mark.parametrize("per, shape, strategy", [("tensor", (1,), "tensor"), ("head", (2, 1, 1), "attn_head")])
def test_transformers_computes_the_same(tmp_path, per, shape, strategy, readable_cache):
    model = with_cache(per)
    report = qcompile.export(model, tmp_path / "out", progress=False)
    assert report.passes[-1].notes[0] == "2 scales of an fp8 key/value cache"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (m(ids(), use_cache=True).logits for m in (model, again))
        without = model(**name_cache(model, {"input_ids": ids()}, OtherCache())).logits
    assert torch.equal(ours, theirs) and float((ours - without).abs().max()) > 0.05, "the cache changes them"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = model.qcompile_scales.all[0]
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        stored = tensors[f"model.layers.0.self_attn.{name}"]
        assert stored.shape == shape and torch.equal(stored.flatten(), scale[: len(stored), 0])
    assert not any(name.startswith("qcompile") for name in tensors)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert config == {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}


def test_a_saved_model_computes_the_same_and_is_exported_too(tmp_path):
    model = with_cache("head", torch.bfloat16)
    qcompile.save(model, tmp_path / "saved")
    again = qcompile.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model(ids(), use_cache=True).logits, again(ids(), use_cache=True).logits)
    qcompile.export(again, tmp_path / "out", progress=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.v_scale"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored.flatten().float(), model.qcompile_scales.all[0][1][:, 0])


def test_a_preset_has_one(tmp_path):
    qcompile.export(decoder(torch.bfloat16), tmp_path / "o", "serve-w4a16-kv8", [ids()], to="vllm", progress=False)
    assert json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]["kv_cache_scheme"] is not None


def test_what_files_cannot_say_is_refused(tmp_path):
    model = with_cache("tensor")
    assert stores_cache(model) and not stores_cache(decoder())
    with pytest.raises(ExportError, match="1 layers of a key/value cache, and 2 modules that fill one"):
        cache_layout(model, ["a", "b"], "compressed-tensors")
    model.qcompile_scales.keys0 = torch.full_like(model.qcompile_scales.keys0, 0.1)
    with pytest.raises(ExportError, match="layer: scales that are no values of float16.*Fix: load the model in bfloat"):
        cache_layout(model.half(), ["layer"], "compressed-tensors")
    config = QuantizeKV(8, static=True, fp8="tensor")
    for to in ("gptq", "awq"):
        with pytest.raises(ExportError, match="a key/value cache of ours, which .* cannot say.*Fix: drop QuantizeKV"):
            recipe = Recipe("kv", (config, W4, Fuse()))
            qcompile.export(decoder(torch.bfloat16), tmp_path / "o", recipe, [ids()], to=to, progress=False)
    with pytest.raises(ExportError, match="a 8-bit key/value cache of ours"):
        qcompile.export(with_cache("tensor", torch.bfloat16), tmp_path / "o", to="gptq", progress=False)
    plain = dataclasses.replace(config, fp8="")
    with pytest.raises(ExportError, match="for vLLM use QuantizeKV.8, static=True, fp8='tensor'"):
        recipe = Recipe("kv", (plain, W4, Fuse()))
        qcompile.export(decoder(), tmp_path / "o", recipe, [ids()], progress=False)
