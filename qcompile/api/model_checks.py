"""What a model must be before any work: its weights are here, and nothing in it stands in the way of a second run."""

from __future__ import annotations

from typing import Any

from torch import nn

from qcompile.analysis.facts import Facts
from qcompile.modules.generation_hooks import hooks_of
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.recipe.recipe import Recipe
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


def check_experts(recipe: Recipe, facts: Facts) -> None:
    """Refuse to quantize what experts read in place: a model multiplies its stacks itself, so no module can do it.

    Raises:
        RecipeError: a recipe with experts_act, for a model with experts.
    """
    site = next((site for site in facts.sites if site.kind == "experts"), None)
    for config in recipe.passes:
        if site is not None and isinstance(config, Quantize) and config.experts_act is not None:
            raise RecipeError(
                f"{site.name}: {type(config).__name__} quantizes what experts read (experts_act={config.experts_act}), "
                "which no module of a model can do. Fix: drop experts_act, or "
                f"torch.compile(model, backend='qcompile', options={{'recipe': {recipe.name!r}}})"
            )


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate, alone or among others, brings the weights for each call."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))
