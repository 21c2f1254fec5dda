"""What a model must be before any work: its weights are here, and nothing in it stands in the way of a second run."""

from __future__ import annotations

from typing import Any

from torch import nn

from qcompile.modules.generation_hooks import hooks_of
from qcompile.recipe.rule import RecipeError


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be quantized in place, whatever the recipe.

    Raises:
        RecipeError: weights on the meta device or offloaded; a model that already has a quantized cache or a prefix.
    """
    offloaded = next((path for path, module in model.named_modules() if _is_offloaded(module)), None)
    if offloaded is not None:
        raise RecipeError(
            f"the weights of {offloaded or 'the model'} are offloaded (accelerate brings them for each call). "
            "Fix: load the model without offloading, as from_pretrained(.., device_map='cpu')"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise RecipeError(
            f"{len(empty)} of {len(tensors)} tensors are on the meta device and hold no data ({empty[0]}). "
            "Fix: load the weights first"
        )
    for hooks in map(hooks_of, model.modules()):
        if hooks.config is None and hooks.prefix is None:
            continue
        what = "quantized key/value cache" if hooks.config is not None else "prefix that stays float"
        raise RecipeError(
            f"{type(model).__name__} was quantized before and has a {what}, which would run inside the second run. "
            "Fix: quantize the float model with one recipe"
        )


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate, alone or among others, brings the weights for each call."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))
