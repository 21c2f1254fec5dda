"""Digests: equal content gives equal digests, and any difference another one."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from zoo import build

from qcompile.memory.digest import digest, model_digest


@dataclass
class Point:
    x: int
    y: object = None


def test_equal_content_is_equal_and_other_content_is_not():
    values = [
        None, True, 1, 1.0, "1", b"1", [], {}, [[]], [1], [1, 2], [2, 1], [[1], 2], {"a": 1}, {"b": 1}, {"a": [1]},
        torch.tensor([1]), torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor(1), torch.empty(0),
        [torch.tensor([1]), torch.tensor([2])], Point(1), Point(1, 2), "a\ud800",
    ]  # fmt: skip
    found = [digest(value) for value in values]
    assert len(set(found)) == len(values) and all(len(text) == 32 for text in found)
    assert found == [digest(copy.deepcopy(value)) for value in values]
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) and digest((1, 2)) == digest([1, 2])
    assert digest(np.array([1])) == digest(torch.tensor([1]))


def test_a_model_is_its_structure_settings_and_tensors():
    model = build("llama")
    same, weight, buffer, setting, recipe = (copy.deepcopy(model) for _ in range(5))
    same.config._name_or_path = "elsewhere"
    assert model_digest(same) == model_digest(model)
    with torch.no_grad():
        weight.lm_head.weight[3, 4] += 1e-3
        next(buffer.buffers()).mul_(2)
    setting.config.rms_norm_eps *= 2
    recipe.qcompile_recipe = {"passes": []}
    others = [weight, buffer, setting, recipe, nn.LayerNorm(4), nn.LayerNorm(4, eps=1e-3)]
    assert len({model_digest(m) for m in [model, *others]}) == 1 + len(others)
