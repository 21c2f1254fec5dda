"""QA-LoRA as a layer of PEFT: saved, loaded, merged and unmerged exactly, and PEFT's own adapters with their scale."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import build

import qcompile
from qcompile import QuantLinear, RecipeError
from qcompile.training.peft_layer import QALoraLayer

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized():
    model = build("llama")
    qcompile.quantize(model, "w4a16-g32", progress=False)
    return model


def moved(model, seed=5):
    """Adapters that say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return model.eval()


def adapted(quantized, **fields):
    model = copy.deepcopy(quantized)
    return moved(get_peft_model(model, qcompile.peft_config(model, 4, 8, task_type="CAUSAL_LM", **fields)))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_merging_is_exact_and_unmerging_restores_every_bit(quantized):
    model = adapted(quantized)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    assert (before - logits(quantized)).abs().max() > 0.1 * before.abs().max()
    model.merge_adapter(safe_merge=True)
    layers = [module for module in model.modules() if isinstance(module, QALoraLayer)]
    assert layers and all(layer.merged and layer.base_layer.format.zero == "float" for layer in layers)
    assert torch.allclose(logits(model), before, rtol=0, atol=3e-5 * float(before.abs().max()))
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(logits(model), before)


def test_merge_and_unload_gives_a_plain_quantized_model(quantized, tmp_path):
    model = adapted(quantized)
    before = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(quantized) and not any(isinstance(m, QALoraLayer) for m in merged.modules())
    assert torch.allclose(logits(merged), before, rtol=0, atol=3e-5 * float(before.abs().max()))
    qcompile.save(merged, tmp_path / "out")
    assert torch.equal(logits(qcompile.load(tmp_path / "out")), logits(merged))


def test_two_adapters_add(quantized):
    model = adapted(quantized)
    model.add_adapter("other", qcompile.peft_config(quantized, 2, 8, task_type="CAUSAL_LM"))
    moved(model, seed=6)
    base = copy.deepcopy(model)
    base.base_model.set_adapter(["default", "other"])
    both = logits(base)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert not torch.allclose(logits(model), both, atol=1e-2)
    base.merge_adapter()
    assert torch.allclose(logits(base), both, rtol=0, atol=3e-5 * float(both.abs().max()))
    base.unmerge_adapter()
    with base.disable_adapter():
        assert torch.equal(logits(base), logits(quantized))


def test_saved_adapters_are_read_back(quantized, tmp_path):
    model = adapted(quantized)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["qalora_pooling"] == "mean"
    again = qcompile.load_adapter(copy.deepcopy(quantized), tmp_path)
    assert torch.equal(logits(again), logits(model)) and not any(p.requires_grad for p in again.parameters())
    trainable = qcompile.load_adapter(copy.deepcopy(quantized), tmp_path, is_trainable=True)
    assert all(p.requires_grad for name, p in trainable.named_parameters() if "lora" in name)


def test_adapters_that_peft_trained_have_its_scale(quantized, tmp_path):
    """peft 0.21 multiplies the mean by the number of groups (tuners/lora/variants.py)."""
    adapted(quantized).save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    del config["qalora_pooling"]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True, "qalora_group_size": 32}))
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    save_file(tensors, theirs / "adapter_model.safetensors")
    model = qcompile.load_adapter(copy.deepcopy(quantized), theirs)
    for layer in (module for module in model.modules() if isinstance(module, QALoraLayer)):
        x = torch.randn(3, layer.base_layer.in_features)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        pooled = x.view(3, -1, 32).mean(2)
        want = layer.base_layer(x) + pooled * pooled.shape[1] @ a.t() @ b.t() * (8 / 4)
        assert torch.allclose(layer(x), want, rtol=1e-4, atol=1e-4)
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True, "qalora_group_size": 16}))
    with pytest.raises(RecipeError, match=r"pools groups of 16, and the model has groups of \[32\]"):
        qcompile.load_adapter(copy.deepcopy(quantized), theirs)


def test_adapters_of_other_kinds_are_refused(quantized, tmp_path):
    plain = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    plain.save_pretrained(tmp_path / "lora")
    with pytest.raises(RecipeError, match="plain LoRA adapter.*cannot be merged into zero points"):
        qcompile.load_adapter(copy.deepcopy(quantized), tmp_path / "lora")
    with pytest.raises(RecipeError, match="adapter_config.json does not exist"):
        qcompile.load_adapter(quantized, tmp_path)


@pytest.mark.parametrize("field", [{"use_dora": True}, {"lora_bias": True}])
def test_what_cannot_be_merged_is_refused(quantized, field):
    with pytest.raises(RecipeError, match=f"QA-LoRA: {next(iter(field))} cannot be merged"):
        qcompile.peft_config(quantized, **field)
    with pytest.raises(RecipeError, match="qalora_pooling is 'sum'"):
        qcompile.peft_config(quantized, qalora_pooling="sum")


def test_a_module_that_cannot_have_an_adapter_is_named(quantized):
    with pytest.raises(RecipeError, match="lm_head: int8/row has one scale for a row"):
        model = copy.deepcopy(quantized)
        get_peft_model(model, qcompile.peft_config(model, target_modules=["lm_head"]))


def test_nan_is_refused_by_a_safe_merge(quantized):
    model = adapted(quantized)
    layer = next(module for module in model.modules() if isinstance(module, QALoraLayer))
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="adapter 'default' has NaN or Inf"):
        layer.merge(safe_merge=True)
    assert isinstance(layer.base_layer, QuantLinear) and layer.base_layer.format.zero != "float" and not layer.merged


def test_dropout_and_half_precision(quantized):
    model = adapted(quantized, lora_dropout=0.5)
    model.eval()
    still = logits(model)
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(logits(model), still)
    half = model.eval().bfloat16()
    assert logits(half).dtype == torch.bfloat16
    assert isinstance(model, PeftModel) and isinstance(half, nn.Module)


def test_an_adapter_for_each_row_is_refused(quantized):
    model = adapted(quantized)
    with pytest.raises(ValueError, match="adapter_names gives each row of a batch an adapter of its own.*set_adapter"):
        model(input_ids=IDS, adapter_names=["__base__", "default"])


def test_a_model_with_adapters_beside_it_is_not_saved_as_if_it_were_merged(quantized, tmp_path):
    model = adapted(quantized)
    for attempt in (lambda: qcompile.save(model, tmp_path / "out"), lambda: qcompile.settle(model)):
        with pytest.raises(ValueError, match=r"is in training \(QALoraLayer\).*Fix: model.merge_and_unload\(\) first"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_cannot_be_merged_is_named(quantized):
    model = adapted(quantized)
    layer = next(module for module in model.modules() if isinstance(module, QALoraLayer))
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="q_proj, adapter 'default': its adapter cannot be merged"):
        model.merge_adapter()
