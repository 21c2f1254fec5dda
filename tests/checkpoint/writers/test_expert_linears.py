"""Experts of a quantized stack are the linears that checkpoints store: rows of it, exactly."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from served_models import FLOAT_LOGITS, recipe
from transformers.core_model_loading import revert_weight_conversion
from zoo import build, example

import qcompile
from qcompile.api import export_model
from qcompile.checkpoint.writers.compressed_tensors_layout import compressed_layout
from qcompile.checkpoint.writers.expert_linears import quantized_stacks, served_linears, stack_columns
from qcompile.checkpoint.writers.export_refusals import ExportError, quantized_linears
from qcompile.modules.quant_experts import QuantStack
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor
from qcompile.recipe.rule import Rule

TARGET = "compressed-tensors"


def quantized(name, weight="int4/group32", rules=()):
    model = build(name)
    qcompile.quantize(model, recipe(weight, rules=rules), example=example(name), progress=False)
    return model


@pytest.mark.parametrize("weight", ["int4/group32", "int4/group32/zero", "int8/row", "fp8/row"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_are_rows_of_the_stack(name, weight):
    model = quantized(name, weight)
    linears, stacks = served_linears(model, TARGET), quantized_stacks(model)
    floats = {
        key: value
        for stack, module in stacks.items()
        for key, value in revert_weight_conversion(model, {stack: module()}).items()
    }
    assert len(stacks) == 4 and len(floats) == 2 * 3 * 4, "gate, up and down of four experts in two layers"
    assert set(linears) - set(quantized_linears(model)) == {key.removesuffix(".weight") for key in floats}
    for key, value in floats.items():
        assert torch.equal(linears[key.removesuffix(".weight")].weight, value), key


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_folder_holds_each_expert_and_the_package_reads_it(tmp_path, name):
    model = quantized(name, rules=FLOAT_LOGITS)
    report = qcompile.export(model, tmp_path / "out", progress=False)
    count = len(served_linears(model, TARGET))
    assert report.passes[-1].notes[-1] == f"{count} weights read back by compressed-tensors, equal bit for bit"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("_codes" in key for key in tensors)
    expert = next(key for key in tensors if ".experts.1." in key and key.endswith("weight_packed"))
    path = expert.removesuffix(".weight_packed")
    _, _, schemes = compressed_layout(model)
    parts = {part: tensors[f"{path}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
    scheme = QuantizationScheme(targets=["Linear"], **schemes[path])
    read = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
    assert torch.equal(read, served_linears(model, TARGET)[path].weight)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- 4 x stack of experts in int4/group32" in card and "expert by expert" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


def test_stacks_of_their_own_format_name_every_expert(tmp_path):
    model = quantized("mixtral", rules=(Rule("*experts*", weight="int8/row"), Rule("lm_head.*", keep=True)))
    qcompile.export(model, tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert sum(len(paths) for paths in targets) == len(served_linears(model, TARGET))
    assert any("model.layers.1.block_sparse_moe.experts.3.w2" in paths for paths in targets)


def test_columns_of_stacks_are_known_before_they_are_quantized(monkeypatch):
    model = build("mixtral")
    found = stack_columns(model)
    assert set(found) == set(quantized_stacks(quantized("mixtral")))
    for name, columns in found.items():
        assert columns == model.get_parameter(name).shape[2], name
    for weight, words in (("int4/group48", "experts.*: a last group of"), ("fp4/row", "experts.*: e2m1 codes")):
        rules = (Rule("*experts*", weight=weight),)
        with pytest.raises(ExportError, match=words):
            qcompile.export(model, "never", recipe("int4/group32", rules=rules), progress=False)
    monkeypatch.setattr(export_model, "quantize", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(ExportError, match="experts.*: a quantized stack of experts, which gptq cannot say. Fix: keep"):
        plain = recipe("int4/group32/bf16")
        qcompile.export(build("mixtral").bfloat16(), "never", plain, to="gptq", progress=False)


def test_columns_first_and_what_are_no_rows(monkeypatch):
    from transformers import core_model_loading

    weight = torch.randn(2, 3, 32)
    parts = quantize_tensor(weight.flatten(0, 1), Format.parse("int4/group16")).stored_parts
    stacked = [part if part is None else part.unflatten(0, (2, 3)) for part in parts]
    stack = QuantStack(dict(zip(PARTS, stacked, strict=True)), Format.parse("int4/group16"), 32, False, torch.float32)
    model = torch.nn.Module()
    model.add_module("w_codes", stack)

    def split(model, state):
        (whole,) = state.values()
        return {f"e.{i}.weight": part.t() for i, part in enumerate(whole)}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", split)
    found = served_linears(model, TARGET)
    assert torch.equal(found["e.1"].weight, stack()[1].t()), "the parameter is [E, K, N]"
    others = {
        "w": lambda whole: whole,  # one tensor
        "e.weight": lambda whole: whole[0],  # columns first
        "mixed.weight": lambda whole: whole.permute(0, 2, 1).reshape(-1, 32).t().reshape(-1, 32),  # parts of other rows
    }
    for key, part in others.items():
        monkeypatch.setattr(
            core_model_loading, "revert_weight_conversion", lambda m, s, k=key, p=part: {k: p(next(iter(s.values())))}
        )
        with pytest.raises(
            ExportError, match=f"w: a stack that checkpoints do not store as rows of it .{key}., which .*Fix: keep"
        ):
            served_linears(model, TARGET)
