"""What stands around a model and computes nothing: wrappers of torch.compile, data parallelism, adapters."""

from __future__ import annotations

from torch import nn

from qcompile.modules.wrappers import unwrapped
from qcompile.recipe.rule import RecipeError


def inner_model(model: nn.Module, fix: str = "quantize the whole model before it is sharded") -> nn.Module:
    """The model behind its wrappers, which is what is quantized: the wrapper then calls the quantized model.

    Args:
        model: any module; of a wrapper with `get_base_model`, as adapters are, one with parameters of its own stays.
        fix: what to do with parameters that are shards.

    Raises:
        RecipeError: the parameters are shards of which other processes have the rest.
    """
    outer = None
    while outer is not model:
        outer, model = model, _without_adapters(unwrapped(model))
    _check_whole(model, fix)
    return model


def _without_adapters(model: nn.Module) -> nn.Module:
    base = described(model)
    own = {id(parameter) for parameter in model.parameters()}
    return base if own <= {id(parameter) for parameter in base.parameters()} else model


def described(model: nn.Module) -> nn.Module:
    """The model whose config and example inputs are those of a model with adapters; any other model itself."""
    if "get_base_model" not in dir(type(model)):
        return model
    base = model.get_base_model()  # type: ignore[operator]
    return base if isinstance(base, nn.Module) else model


def _check_whole(model: nn.Module, fix: str) -> None:
    sharded = [path for path, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"]
    if sharded:
        raise RecipeError(f"{sharded[0] or 'the model'} is sharded by FSDP. Fix: {fix}")
    for name, parameter in model.named_parameters():
        if "DTensor" in (type(parameter).__name__, type(parameter.data).__name__):
            raise RecipeError(
                f"{name} is a shard of a parameter that other processes hold too (FSDP or tensor parallelism). "
                f"Fix: {fix}"
            )
