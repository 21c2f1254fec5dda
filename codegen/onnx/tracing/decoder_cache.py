"""The cache of a causal LM, read from one eager call: keys and values, or a refusal that says what else it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError

_WITHOUT = "Fix: pass example={'input_ids': ids} for a file without a cache, which reads the whole text in each call"


def cache_layers(model: nn.Module) -> list[Any]:
    """The layers of the cache that a model returns, each with `keys` and `values` [B, G, T, D].

    Args:
        model: takes input_ids and use_cache, as transformers' causal LMs do.

    Raises:
        OnnxUnsupportedError: the model takes no tokens, returns no cache, or caches something else too.
    """
    name = type(model).__name__
    with torch.no_grad():
        try:
            out = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=_device(model)), use_cache=True)
        except Exception as error:  # the model's own, of whatever kind
            raise OnnxUnsupportedError(
                f"{name} is not called as a causal LM is, with input_ids and use_cache ({type(error).__name__}: "
                f"{error}). Fix: pass example=, the inputs that it takes"
            ) from error
    layers = getattr(getattr(out, "past_key_values", None), "layers", None)
    if not layers:
        raise OnnxUnsupportedError(
            f"{name} returns no keys and values in past_key_values, where a causal LM has its cache. {_WITHOUT}"
        )
    others = [
        f"layer {index} ({type(layer).__name__})"
        for index, layer in enumerate(layers)
        if hasattr(layer, "conv_states") or not isinstance(getattr(layer, "keys", None), Tensor)
    ]
    if others:
        raise OnnxUnsupportedError(
            f"{name} caches more than keys and values: {', '.join(others[:3])}{' ..' if len(others) > 3 else ''} keep "
            f"the state of a recurrence, or nothing, and a file has keys and values for every layer. {_WITHOUT}"
        )
    return list(layers)


def _device(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)
