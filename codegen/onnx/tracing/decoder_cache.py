"""The cache of a causal LM, read from one eager call: keys and values, or a refusal that says what else it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError
from qcompile.modules.cache_argument import cache_name, returned_cache
from qcompile.modules.recurrent_layers import recurrent_layers

_WITHOUT = "Fix: pass example={'input_ids': ids} for a file without a cache, which reads the whole text in each call"
_SCANS = " (refused too where the model's own code computes with the length, as scans of state-space models do)"


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
    layers = getattr(returned_cache(out), "layers", None) or []
    # A newer transformers gives a model without attention a cache as well, of layers without keys; of some hybrids each
    # layer has both.
    states = recurrent_layers(layers)
    if all(index in states and not hasattr(layer, "keys") for index, layer in enumerate(layers)):
        raise OnnxUnsupportedError(
            f"{name} returns no keys and values in {cache_name()}, where a causal LM has its cache. {_WITHOUT}{_SCANS}"
        )
    recurrent = [f"layer {index} ({kind})" for index, kind in states.items()]
    if recurrent:
        raise OnnxUnsupportedError(
            f"{name} is a hybrid: beside keys and values it caches the state of a convolution or of a recurrence in "
            f"{', '.join(recurrent[:3])}{' ..' if len(recurrent) > 3 else ''}. {_WITHOUT}{_SCANS}"
        )
    empty = [str(index) for index, layer in enumerate(layers) if not isinstance(getattr(layer, "keys", None), Tensor)]
    if empty:
        raise OnnxUnsupportedError(
            f"{name} caches no keys and values in layers {', '.join(empty)}, and a file has them for every layer. "
            f"{_WITHOUT}"
        )
    return list(layers)


def _device(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)
