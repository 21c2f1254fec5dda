"""What a model says of its own tied weights: kept true when some of them are no longer tied.

transformers' models name tied parameters (`_tied_weights_keys`, `all_tied_weights_keys`) and have a flag in their
config; `tie_weights`, saving and loading follow them, and would overwrite a head with weights of its own by the table.

    ties = named_ties(model)
    ..                              replace modules, set parameters
    forget_broken_ties(model, ties)
"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

from torch import Tensor, nn

_KEYS, _ALL_KEYS, _FLAG = "_tied_weights_keys", "all_tied_weights_keys", "tie_word_embeddings"

Ties = list[tuple[nn.Module, dict[str, str]]]
"""Models (inside a model), each with its tied parameters: target -> source, without patterns."""


def named_ties(model: nn.Module) -> Ties:
    """The ties that a model and the models inside it name."""
    found: Ties = []
    for module in model.modules():
        expand: Any = getattr(module, "get_expanded_tied_weights_keys", None)
        if expand is not None and getattr(getattr(module, "config", None), _FLAG, False):
            found.append((module, dict(expand(all_submodels=False))))
    return found


def forget_broken_ties(model: nn.Module, ties: Ties) -> None:
    """Take out of the model's own lists what is not tied any more.

    Args:
        model: changed in place: its lists, and the flag of a config whose ties are all gone.
        ties: of `named_ties`, from before parameters were replaced.
    """
    for module, before in ties:
        kept = _still_tied(module, before)
        if len(kept) == len(before):
            continue
        setattr(module, _KEYS, kept)
        if not kept and not any(_reads_flag(m) for m in model.modules()):
            config: Any = module.config
            setattr(config, _FLAG, False)
    for module in model.modules():
        names = getattr(module, _ALL_KEYS, None)
        if isinstance(names, dict):
            setattr(module, _ALL_KEYS, _still_tied(module, names))


def _still_tied(module: nn.Module, names: dict[str, str]) -> dict[str, str]:
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    return {t: s for t, s in names.items() if t in tensors and tensors[t] is tensors.get(s)}


def _reads_flag(module: nn.Module) -> bool:
    """Whether a module's forward reads the config's flag: some scale what a tied head reads, and must go on to."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and _names(code)


def _names(code: CodeType) -> bool:
    return _FLAG in code.co_names or any(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType))
