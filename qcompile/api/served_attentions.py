"""Which module of a model of transformers fills each layer of its key/value cache, found by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.api.model_example import own_example
from qcompile.modules.cache_argument import with_cache


def attention_paths(model: Any) -> list[str]:
    """The innermost module that is running when each layer of the cache gets its keys and values, layer by layer."""
    from transformers.cache_utils import DynamicCache

    running: list[str] = []
    found: dict[int, str] = {}

    class NotingCache(DynamicCache):  # type: ignore[misc]  # transformers has no types here
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            found.setdefault(layer_idx, running[-1])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()

    handles = [
        handle
        for path, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(lambda module, args, path=path: running.append(path)),
            module.register_forward_hook(leave),
        )
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**with_cache(model, own_example(model) | {"use_cache": True}, NotingCache()))
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in sorted(found)]
