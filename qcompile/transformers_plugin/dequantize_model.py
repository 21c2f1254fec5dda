"""`model.dequantize()`: float modules whose weights are what the codes stand for.

    W = D(codes) + U' V'        the low-rank correction where there is one, the Hadamard transform undone

so that a weight-only model computes the same, up to rounding. Activations and the key/value cache stay float, and a
prefix that was kept float is gone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.quantized_stacks import STACK_SUFFIX
from qcompile.modules.generation_hooks import hooks_of
from qcompile.modules.kv_constants import CENTERS, PREFIX, SCALES
from qcompile.modules.quant_experts import QuantStack, restore_parameter
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.modules.static_quant import StaticQuantConv
from qcompile.numerics.hadamard import undo_hadamard


def dequantize_model(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Replace all quantized modules of a model, in place.

    Args:
        model: of transformers, quantized.
        dtype: of the float weights; None for float32.

    Returns:
        The model.
    """
    made: dict[int, nn.Module] = {}  # one for all places of a module
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QuantStack):
            owner, _, leaf = path.removesuffix(STACK_SUFFIX).rpartition(".")
            restore_parameter(model.get_submodule(owner), leaf, module().to(dtype or module.dtype))
        elif isinstance(module, (QuantLinear, RotatedLinear, StaticQuantConv)):
            if id(module) not in made:
                made[id(module)] = float_module(module, dtype or torch.float32)
            model.set_submodule(path, made[id(module)])
    hooks = hooks_of(model)
    hooks.config = hooks.prefix = hooks.centers = hooks.scales = None
    for name in (PREFIX, CENTERS, SCALES):
        model._modules.pop(name, None)
    model.requires_grad_(False)
    if _is_of_its_class(model):
        vars(model).pop("save_pretrained", None)
        vars(model).pop("qcompile_recipe", None)
    return model


def float_module(module: QuantLinear | RotatedLinear | StaticQuantConv, dtype: torch.dtype) -> nn.Module:
    """The float module that stands for a quantized one, with weights of a dtype."""
    if isinstance(module, RotatedLinear):
        return _unrotated(module, dtype)
    if isinstance(module, StaticQuantConv):
        return _convolution(module, dtype)
    weight = module.weight.as_subclass(Tensor)
    factors = module.factors(torch.float32)
    if factors:
        correction = factors[1] @ factors[0]
        weight = weight + (correction if module.signs is None else undo_hadamard(correction, module.signs))
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    return _filled(linear, weight, module.bias, dtype)


def _unrotated(module: RotatedLinear, dtype: torch.dtype) -> nn.Module:
    """The inner module with a weight that takes x as it is; one that stores [K, N] keeps that layout."""
    inner, signs = copy.copy(module.inner), module.signs.double()
    inner._parameters = dict(module.inner._parameters)
    weight: Any = module.inner.weight
    if isinstance(inner, nn.Linear):
        found = undo_hadamard(weight.double(), signs)
    else:
        found = undo_hadamard(weight.double().t(), signs).t()
    return _filled(inner, found, module.bias, dtype)


def _convolution(module: StaticQuantConv, dtype: torch.dtype) -> nn.Module:
    kinds: list[Any] = [nn.Conv1d, nn.Conv2d]
    shape, (rows, columns, *kernel) = module.shape, module.size
    convolution = kinds[len(kernel) - 1](
        columns * shape.groups, rows, tuple(kernel), shape.stride, shape.padding, shape.dilation, shape.groups,
        bias=module.bias is not None, device="meta",
    )  # fmt: skip
    return _filled(convolution, module.weight, module.bias, dtype)


def _filled(module: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    parameters = {"weight": weight, "bias": bias}
    for name, tensor in parameters.items():
        value = None if tensor is None else nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False)
        module.register_parameter(name, value)
    return module.eval()


def _is_of_its_class(model: Any) -> bool:
    """Whether the model is what its class builds: passes may have left other norms, or biases where none were."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))

    def described(each: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        shapes = {name: tensor.shape for name, tensor in each.state_dict().items()}
        return shapes, {path: type(module).__name__ for path, module in each.named_modules()}

    return described(fresh) == described(model)
