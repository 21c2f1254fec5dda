"""Put a module in the place of another: at each path that leads to it, with its hooks and its mode."""

from __future__ import annotations

from torch import nn

from qcompile.modules.fast_paths import leave_fast_paths

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_non_full_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""The attributes of nn.Module in which hooks stand. The dicts move themselves: handles remove from them."""


def take_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module of a model by another that is called in the same way.

    Args:
        model: changed in place.
        old: some module inside it. It has no hooks afterwards, so `new` may call it.
        new: gets the hooks of `old`, with the handles that remove them, and its mode.
    """
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is old]
    fresh = nn.Module()
    for name in _HOOKS:
        if hasattr(old, name) and hasattr(fresh, name):
            setattr(new, name, getattr(old, name))
            setattr(old, name, getattr(fresh, name))
    new.train(old.training)
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        leave_fast_paths(model, path)
