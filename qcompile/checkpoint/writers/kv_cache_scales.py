"""Static scales of an fp8 key/value cache in compressed-tensors: what servers round keys and values with.

    <attention>.k_scale, .v_scale     [1], or [heads, 1, 1]     k ~ s e4m3(k / s)

Source: compressed-tensors 0.20, quantization/lifecycle/initialize.py, and `kv_cache_scheme` of its quant_config.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.writers.export_refusals import exact_scale, refuse
from qcompile.checkpoint.writers.float_tensors import model_dtype
from qcompile.modules.generation_hooks import hooks_of

_STRATEGIES = {"tensor": "tensor", "head": "attn_head"}


def stores_cache(model: nn.Module) -> bool:
    """Whether a model's calls have a cache that checkpoints can say: e4m3 with static scales."""
    config = hooks_of(model).config
    return config is not None and bool(config.fp8)


def cache_layout(model: nn.Module, attentions: list[str], target: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The scales of all layers.

    Args:
        model: quantized, with such a cache (`stores_cache`).
        attentions: the path of the module that fills each layer of the cache.
        target: the format, for messages.

    Returns:
        Tensors by name, in the model's dtype, and the kv_cache_scheme of config.json.

    Raises:
        ExportError: other layers than scales, or scales that the model's dtype does not hold.
    """
    hooks = hooks_of(model)
    assert hooks.config is not None and hooks.scales is not None
    per, scales, dtype = hooks.config.fp8, hooks.scales.all, model_dtype(model)
    if len(attentions) != len(scales):
        what = f"{len(scales)} layers of a key/value cache, and {len(attentions)} modules that fill one"
        refuse(target, "the model", what, "quantize without QuantizeKV")
    tensors = {}
    for path, pair in zip(attentions, scales, strict=True):
        for name, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            own = scale.detach().cpu()[:, 0].clone(memory_format=torch.contiguous_format)
            stored = own[:1] if per == "tensor" else own[:, None, None]
            fix = "load the model in bfloat16 or float32"
            tensors[f"{path}.{name}"] = exact_scale(path, stored, dtype, target, fix)
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": _STRATEGIES[per], "dynamic": False}
    return tensors, scheme
