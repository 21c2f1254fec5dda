"""Everything that a recipe makes must be where the model is.

There is no second device here, but there is "meta": tensors that have a shape and no elements, and refuse to meet those
of a CPU. Where Python asks for a value, it gets one.
"""

from __future__ import annotations

import functools
import itertools
import sys

import pytest
import torch
import torch.fx.experimental._config as config
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import brief, build, example

import qcompile.memory.weight_cache
import qcompile.numerics.rounding
import qcompile.pipeline.run
from qcompile.api.example_inputs import flat_inputs, widen_batch
from qcompile.codegen.triton.gpu_lowering import lower_to_gpu
from qcompile.ir.capture import capture
from qcompile.pipeline.presets import PRESETS
from qcompile.pipeline.run import run

aten = torch.ops.aten
META = torch.device("meta")
# FineQuant has a budget of bits that these tiny models' rows cannot keep
RECIPES = [name for name, recipe in PRESETS.items() if recipe.passes and "finequant" not in name]
CALIBRATED = [name for name in RECIPES if PRESETS[name].needs]


class Decided(TorchDispatchMode):
    """Values that Python asks for are one; products must be of one device, which meta kernels do not ask for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is aten.equal.default and args[0].is_meta:
            return True
        if func is aten._to_copy.default and args[0].is_meta and (kwargs or {}).get("device", META).type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default) and len({t.device for t in tensors}) > 1:
            raise AssertionError(f"{func} of {[t.device.type for t in tensors]}")
        return func(*args, **(kwargs or {}))


def on_meta(program):
    """The program with all its tensors on the meta device, in place."""
    program.weights.update({name: tensor.to("meta") for name, tensor in program.weights.items()})
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            node.meta["val"] = program.fake_mode.from_tensor(there, static_shapes=True)
        node.args, node.kwargs = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: META if isinstance(a, torch.device) else a
        )
    program.graph_module.recompile()
    return program


def devices(program):
    values = [node.meta.get("val") for node in program.graph.nodes] + list(program.weights.values())
    return {value.device.type for value in values if isinstance(value, torch.Tensor)}


@functools.lru_cache(maxsize=1)
def captured(name):
    """The program and its flat inputs, on the meta device."""
    batch = example(name)
    program = capture(build(name).bfloat16(), *widen_batch((), batch))
    flat = flat_inputs(program, batch, batch)
    return on_meta(program), [value.to("meta") if isinstance(value, torch.Tensor) else value for value in flat]


@pytest.mark.parametrize(
    "name,recipe",
    [(name, recipe) for name in ("llama", "gpt2", "gemma2", "falcon", "bert") for recipe in RECIPES
     if name == "llama" or recipe not in CALIBRATED],
)  # fmt: skip
@pytest.mark.slow
def test_recipes_stay_on_the_models_device(name, recipe, monkeypatch):
    count = itertools.count()
    real = qcompile.memory.weight_cache.fingerprint
    for module in list(sys.modules.values()):
        if getattr(module, "fingerprint", None) is real:
            monkeypatch.setattr(module, "fingerprint", lambda tensor: str(next(count)))
    monkeypatch.setattr(qcompile.pipeline.run, "check_weights", lambda *_: None)
    monkeypatch.setattr(qcompile.numerics.clip_search, "SHRINKS", range(2))  # the others are where these are
    monkeypatch.setattr(config, "meta_nonzero_assume_all_nonzero", True, raising=False)
    program, flat = captured(name)
    with Decided():
        rewritten, _ = run(program, brief(PRESETS[recipe]), batches=lambda: iter([flat]), verify=False)
        assert devices(rewritten) == {"meta"}
        lower_to_gpu(rewritten, lambda kind, codes, make: make())
    assert devices(rewritten) == {"meta"}
