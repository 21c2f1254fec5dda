"""A snapshot of what a model is made of, so that a change of it can be undone; no tensor is copied."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModuleSnapshot:
    """The classes, attributes, parameters, buffers, submodules and hooks of all modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
        contents = [value for *_, attributes in self._modules for value in attributes.values()]
        # Dictionaries (of parameters, of hooks) are known to others by identity: their contents are restored.
        self._contents = [(value, dict(value)) for value in contents if isinstance(value, dict)]
        configs = {id(value): value for value in contents if hasattr(value, "tie_word_embeddings")}
        self._configs: list[tuple[Any, dict[str, Any]]] = [(c, dict(vars(c))) for c in configs.values()]

    def restore(self) -> None:
        """Make the model what it was."""
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            _refill(vars(module), attributes)
        for value, content in self._contents:
            _refill(value, content)
        for config, attributes in self._configs:
            _refill(vars(config), attributes)


def _refill(target: dict[Any, Any], content: dict[Any, Any]) -> None:
    target.clear()
    target.update(content)
