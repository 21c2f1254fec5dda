"""A snapshot restores classes, tensors, submodules, hooks and the config of a model."""

from __future__ import annotations

import copy

import torch
from zoo import build, example

import qcompile
from qcompile.api.module_snapshot import ModuleSnapshot


def test_a_quantized_model_becomes_what_it_was():
    model = build("mixtral")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *a: calls.append(1))
    inputs = example("mixtral")
    before, layout, kinds = model(**inputs).logits, str(model), [type(m) for m in model.modules()]
    config, names = copy.deepcopy(vars(model.config)), list(model.state_dict())

    snapshot = ModuleSnapshot(model)
    qcompile.quantize(model, "w4a16-rotated", progress=False)
    assert not torch.equal(model(**inputs).logits, before) and str(model) != layout
    snapshot.restore()

    calls.clear()
    assert torch.equal(model(**inputs).logits, before) and calls
    assert str(model) == layout and [type(m) for m in model.modules()] == kinds
    assert {k: v for k, v in vars(model.config).items() if not k.startswith("_")} == {
        k: v for k, v in config.items() if not k.startswith("_")
    }
    assert list(model.state_dict()) == names and model.lm_head.weight is model.model.embed_tokens.weight
    handle.remove()
    calls.clear()
    model(**inputs)
    assert not calls
