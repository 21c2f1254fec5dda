"""PyTorch's fast paths of transformer layers, which read the weights of linears and never call them.

In evaluation without gradients nn.TransformerEncoderLayer hands the weights of its linears to one kernel. A linear of
another kind in their place would be bypassed: the values would be those of its weight alone, without rounded
activations, and under torch.compile also where the weight is a tensor that refuses it (dequantized_weight.py).
"""

from __future__ import annotations

from torch import nn


def leave_fast_paths(model: nn.Module, path: str) -> None:
    """Have the transformer layers around a module call it, in every mode.

    Args:
        model: attributes of its nn.TransformerEncoderLayer and nn.TransformerEncoder around the path are changed, which
            nothing but their choice of a path reads. What they compute stays the same; at padded positions an encoder
            gives what its layers compute, where the fast path gives zeros.
        path: of a module inside the model.
    """
    owners = [model]
    for name in path.split(".")[:-1]:
        owners.append(owners[-1].get_submodule(name))
    for owner in owners:
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0
        elif isinstance(owner, nn.TransformerEncoder):
            owner.use_nested_tensor = False
