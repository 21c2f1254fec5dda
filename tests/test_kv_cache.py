"""The quantized key/value cache: rounding, agreement of prefill and decoding, generate(), and the graph pass."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from zoo import SIZES, build, example

import qcompile
from qcompile.api import quantize as quantize_module
from qcompile.modules.generation_hooks import attach
from qcompile.modules.kv_cache import KVCache
from qcompile.modules.kv_constants import CENTERS, SCALES, Centers, Scales
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse, IntactKV, Quantize, QuantizeKV
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError

DECODERS = ["llama", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "bloom", "mixtral"]


def test_vectors_are_rounded_head_by_head_and_token_by_token():
    k, v = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    got_k, got_v = KVCache(4).update(k, v, 0)
    want = quantize_tensor(k, Format.parse("int4/row/zero")).dequantize()
    assert torch.allclose(got_k, want, atol=2e-3) and not torch.allclose(got_k, k, atol=1e-2)
    assert (got_v - v).abs().max() < (v.amax(-1) - v.amin(-1)).max() / 15


def test_appending_in_pieces_is_appending_at_once():
    k, v = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    whole, pieces = KVCache(4, hadamard=True, sink_tokens=3), KVCache(4, hadamard=True, sink_tokens=3)
    want = whole.update(k, v, 0)
    for start in range(0, 40, 7):
        got = pieces.update(k[:, :, start : start + 7], v[:, :, start : start + 7], 0)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(got[0][:, :, :3], k[:, :, :3]) and not torch.equal(got[0][:, :, 3], k[:, :, 3])
    assert pieces.get_seq_length() == 40


def test_a_hadamard_helps_keys_with_an_outlier_channel():
    k = torch.randn(1, 1, 32, 64)
    k[..., 5] *= 30
    errors = [(KVCache(4, hadamard=h).update(k, k, 0)[0] - k).norm() for h in (False, True)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("hadamard", [False, True])
def test_taking_the_mean_out_leaves_the_steps_of_what_is_left(hadamard):
    """Each head and channel has a mean of its own, far above what tells tokens apart."""
    mean = 20 * torch.randn(3, 64)
    k = torch.randn(2, 3, 32, 64) + mean[:, None]
    plain, centered = KVCache(4, hadamard=hadamard), KVCache(4, hadamard=hadamard, centers=[mean, mean])
    for layer in range(2):
        errors = [(cache.update(k, k, layer)[0] - k).abs().max() for cache in (plain, centered)]
        assert errors[1] < 0.5 < 1 < errors[0]
        assert torch.equal(
            plain.layers[layer].own_values.read(k.dtype), centered.layers[layer].own_values.read(k.dtype)
        )


def test_centers_are_the_mean_keys_of_the_calibration_and_survive_saving(tmp_path):
    model, ids = build("qwen2"), torch.randint(3, 128, (4, 20))  # its keys have biases, and two heads of four
    with torch.no_grad():
        keys = model(input_ids=ids, use_cache=True).past_key_values.layers[1].keys
    recipe = Recipe("kv", (QuantizeKV(4, center=True), Quantize(Format("int8"), None), Fuse()))
    qcompile.quantize(model, recipe, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], progress=False)
    centers = model.qcompile_centers.all
    assert [tuple(c.shape) for c in centers] == [(2, 16)] * 2
    assert torch.allclose(centers[1], keys[:, :, 4:].mean((0, 2)), atol=1e-5)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        qcompile.save(model, tmp_path / "m")
        assert torch.equal(qcompile.load(tmp_path / "m")(input_ids=ids).logits, want)
    with pytest.raises(RecipeError, match="needs calibration data for QuantizeKV"):
        qcompile.quantize(build("qwen2"), recipe, progress=False)


def test_channels_are_rounded_with_their_fixed_scales():
    scale = torch.rand(2, 16) + 0.5
    k = torch.randn(3, 2, 40, 16) * 127 * scale[:, None] / 4
    k[0, 1, 7, 3] = 1000.0  # beyond the range: the largest code
    whole, pieces = KVCache(8, scales=[(scale, 2 * scale)]), KVCache(8, scales=[(scale, 2 * scale)])
    keys, values = whole.update(k, k, 0)
    inside = k.abs() <= 127 * scale[:, None]
    assert ((keys - k).abs() <= 0.5001 * scale[:, None])[inside].all() and keys[0, 1, 7, 3] == 127 * scale[1, 3]
    assert torch.equal(values, (k / (2 * scale[:, None])).round().clamp(-128, 127) * 2 * scale[:, None])
    for start in range(0, 40, 7):
        got = pieces.update(k[:, :, start : start + 7], k[:, :, start : start + 7], 0)
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)
    assert whole.nbytes == 2 * k.numel() and whole.float_nbytes() == 2 * whole.nbytes
    whole.reorder_cache(torch.tensor([2, 0, 0]))
    whole.crop(-4)
    again, _ = whole.update(k[:, :, :1], k[:, :, :1], 0)
    assert torch.equal(again[:, :, :36], keys[[2, 0, 0], :, :36]) and again.shape[2] == 37


def test_fixed_scales_survive_saving(tmp_path):
    model, ids = build("qwen2"), torch.randint(3, 128, (4, 20))
    recipe = Recipe("kv", (QuantizeKV(8, static=True), Quantize(Format("int8"), None), Fuse()))
    qcompile.quantize(model, recipe, [{"input_ids": ids}], progress=False)
    assert [tuple(part.shape) for pair in model.qcompile_scales.all for part in pair] == [(2, 16)] * 4
    done = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert done.past_key_values.nbytes == 2 * 2 * 2 * 16 * 4 * 24  # layers, keys and values, heads, channels, tokens
    qcompile.save(model, tmp_path / "m")
    again = qcompile.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(RecipeError, match="needs calibration data for QuantizeKV"):
        qcompile.quantize(build("qwen2"), recipe, progress=False)


@pytest.mark.parametrize("bits, share", [(4, 0.35), (8, 0.6)])
def test_memory(bits, share):
    cache = KVCache(bits)
    cache.update(torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64), 0)
    assert cache.nbytes < share * cache.float_nbytes()
    assert cache.float_nbytes() == 2 * 2 * 100 * 64 * 2


def test_beams_and_cropping():
    cache = KVCache(4)
    k = torch.randn(3, 2, 9, 8)
    before, _ = cache.update(k, k, 0)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(-4)
    after, _ = cache.update(k[:, :, :1], k[:, :, :1], 0)
    assert torch.equal(after[:, :, :5], before[[2, 0, 0], :, :5]) and after.shape[2] == 6
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_and_decoding_agree(name):
    model, ids = build(name), example(name)["input_ids"]
    with torch.no_grad():
        float_logits = model(input_ids=ids).logits
        whole = model(input_ids=ids, past_key_values=KVCache(4, hadamard=True), use_cache=True).logits
        cache = KVCache(4, hadamard=True)
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(8)]
    assert relative_error([torch.cat(steps, 1)], [whole]) < 1e-4
    assert 1e-4 < relative_error([whole], [float_logits]) < 0.2


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


def test_a_model_without_a_cache_is_refused_unchanged():
    model, inputs = build("vit"), example("vit")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RecipeError, match="puts nothing into past_key_values"):
        qcompile.quantize(model, Recipe("kv", (QuantizeKV(), Quantize(), Fuse())), [inputs], progress=False)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "bert"])  # takes no cache; fills one that nobody asks for again
def test_an_optional_one_is_left_out_of_a_model_without_a_cache(name):
    model, inputs = build(name), example(name)
    recipe = Recipe("kv", (QuantizeKV(8, static=True, optional=True), Quantize(), Fuse()))
    report = qcompile.quantize(model, recipe, [inputs], progress=False)
    assert [entry.name for entry in report.passes] == ["Quantize", "Fuse", "QuantizeKV"]
    assert "stays float" in report.passes[-1].skipped[0].reason and not hasattr(model, "qcompile_calls")
    assert Recipe.from_json(model.qcompile_recipe).passes == recipe.passes[1:]


def _hybrid():
    """Half of its layers are convolutions, which hold something else than keys and values."""
    return tf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])


def _sharing():
    """The last two of its layers read the keys and values of those before."""
    return tf.Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 4}, head_dim=16, layer_types=["full_attention"] * 4, num_kv_shared_layers=2,
        vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config, why", [(_hybrid, "keys and values only"), (_sharing, "4 attentions, the cache 2 layers")]
)
def test_layers_that_are_not_the_caches(config, why):
    """Refused before any work, or left out."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config()).eval()
    data = [{"input_ids": torch.randint(3, 128, (2, 8))}]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecipeError, match=f"QuantizeKV: .*{why}"):
        patch.setattr(quantize_module, "run", None)
        qcompile.quantize(model, Recipe("kv", (QuantizeKV(8, static=True), Quantize(), Fuse())), data, progress=False)
    optional = Recipe("kv", (QuantizeKV(8, static=True, optional=True), Quantize(), Fuse()))
    report = qcompile.quantize(model, optional, data, progress=False)
    assert why in report.passes[-1].skipped[0].reason and not hasattr(model, "qcompile_calls")


@pytest.mark.parametrize(
    "name, constants", [(CENTERS, Centers([torch.ones(2, 16)])), (SCALES, Scales([(torch.ones(2, 16),) * 2]))]
)
def test_what_the_cache_needs_is_where_the_model_is(name, constants):
    model = build("llama").to("meta")
    attach(model, Recipe("kv", (QuantizeKV(8),)), constants=constants)
    assert {buffer.device.type for buffer in model.get_submodule(name).buffers()} == {"meta"}


def test_scales_stay_float32_in_a_model_that_is_cast():
    scales = Scales([(torch.full((2, 16), 0.1), torch.full((2, 16), 1e-9))])
    scales.to(torch.float16)
    assert all((part == want).all() for part, want in zip(scales.all[0], (0.1, torch.tensor(1e-9)), strict=True))


def test_fixed_scales_do_not_go_with_a_float_prefix():
    model = build("llama")
    recipe = Recipe("kv", (IntactKV((1,)), QuantizeKV(8, static=True), Quantize(), Fuse()))
    with pytest.raises(RecipeError, match="IntactKV keeps its tokens float"):
        qcompile.quantize(model, recipe, [example("llama")], progress=False)


@pytest.mark.parametrize("bad", [dict(bits=3), dict(sink_tokens=-1)])
def test_nonsense_is_refused(bad):
    with pytest.raises(ValueError):
        KVCache(**bad)


@pytest.mark.parametrize("bad", [dict(bits=4), dict(hadamard=True), dict(center=True), dict(sink_tokens=1)])
def test_fixed_scales_stand_alone(bad):
    how = {"bits": 8, **bad}
    how.pop("center", None)
    if how != {"bits": 8}:
        with pytest.raises(ValueError, match="fixed scales are of 8 bits"):
            KVCache(**how, scales=[])
