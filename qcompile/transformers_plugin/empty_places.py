"""Quantized modules without content in a model that transformers is about to fill from files, and the end of loading.

transformers builds the float model on the meta device, fills whatever has the names of tensors in the files, on the
devices that were asked for, and initializes the rest. So modules with empty tensors are put in before, and what it does
not do is done after: buffers that no state_dict has, the quantized cache, and a comparison with the digests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.fill_plan import FillPlan, put_computed
from qcompile.checkpoint.folder_meta import FolderMeta
from qcompile.checkpoint.model_state import slots
from qcompile.checkpoint.save_as_pretrained import give_save_pretrained
from qcompile.checkpoint.tensor_file import changed_tensors, read_empty, read_named
from qcompile.checkpoint.transformers_folder import WEIGHTS
from qcompile.modules.generation_hooks import attach_loaded
from qcompile.modules.tied_names import forget_broken_ties, named_ties

_IGNORED = "_keys_to_ignore_on_load_unexpected"
_INITIALIZED = "_is_hf_initialized"
_COMPUTED = ("computed", "attribute")


class EmptyPlaces:
    """The empty modules of one model.

    Attributes:
        meta: what the folder says of itself.
        files: of tensors.
        empty: the tensors of the files by name, on the meta device.
    """

    def __init__(self, model: Any, meta: FolderMeta, files: list[Path], dtype: torch.dtype | None) -> None:
        """Put them into a model.

        Args:
            model: of transformers, on the meta device; changed in place.
            meta: what the folder says of itself.
            files: of tensors.
            dtype: of the model, where it is to be another than the saved one's; else every tensor keeps its own.

        Raises:
            CheckpointError: the model is of another class, or the files hold other tensors than it has.
        """
        self.meta, self.files = meta, files
        source = files[0].parent
        if type(model).__name__ != meta.model_class:
            raise CheckpointError(
                f"{source} holds a {meta.model_class}, and is opened as {type(model).__name__}: a quantized model has "
                f"no other head or base. Fix: transformers.{meta.model_class}.from_pretrained"
            )
        self.empty = read_empty(files)
        ties = named_ties(model)
        plan = FillPlan.of(model, meta, self.empty, source)
        plan.fills = [(s, t) for s, t in plan.fills if s.kind not in _COMPUTED and (dtype is None or _is_whole(t))]
        added = {name: tensor for name, tensor in plan.added.items() if name not in meta.computed}
        plan.added = {name: tensor.to(dtype or tensor.dtype) for name, tensor in added.items()}
        plan.apply()
        if dtype is not None:
            for module in plan.modules.values():
                module.to(dtype)
        forget_broken_ties(model, ties)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        model.all_tied_weights_keys = {name: owner for name, owner in meta.shared.items() if name in parameters}
        own = set(getattr(model, _IGNORED, None) or ())
        setattr(model, _IGNORED, own | {re.escape(name) for name in meta.computed})
        for module in model.modules():
            setattr(module, _INITIALIZED, True)  # nothing is random: the files have every tensor, computed ones too

    def finish(self, model: Any) -> None:
        """What is left to do once transformers has filled the model.

        Raises:
            CheckpointError: a tensor of the model is not the one that was saved.
        """
        vars(model).pop(_IGNORED, None)
        vars(model.config).pop(WEIGHTS, None)
        self._compare(model)
        self._put_computed(model)
        object.__setattr__(model, "qcompile_recipe", self.meta.recipe)
        recipe = self.meta.parsed_recipe()
        if recipe is not None:
            attach_loaded(model, recipe)
        give_save_pretrained(model)
        model.requires_grad_(False)

    def _put_computed(self, model: nn.Module) -> None:
        """Buffers and attributes that no state_dict has: those that ran, not those that a new model would compute."""
        names = set(self.meta.computed)
        stored = read_named(self.files, names | {self.meta.shared.get(name, name) for name in names})
        self._refuse(changed_tensors(stored, self.meta.tensors or {}), len(stored))
        for name in sorted(names):
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            value = stored[self.meta.shared.get(name, name)]
            old = getattr(owner, leaf, None)
            if isinstance(old, Tensor) and not old.is_meta:
                value = value.to(old.device)
            put_computed(owner, leaf, value)

    def _compare(self, model: nn.Module) -> None:
        """Compare with the digests whatever is in memory as it was stored: not what was cast, and not on disk."""
        expected, source = self.meta.tensors, self.files[0].parent
        found = {name: slot.tensor.detach() for name, slot in slots(model).items()}
        names = self.empty.keys() - self.meta.computed
        if expected is None or expected.keys() != self.empty.keys() or not names <= found.keys():
            raise CheckpointError(f"{source} holds other tensors than its config.json names. Fix: save the model again")
        here = {n: found[n] for n in names if not found[n].is_meta and found[n].dtype == self.empty[n].dtype}
        on_cpu = {name: tensor for name, tensor in here.items() if tensor.device.type == "cpu"}
        changed = changed_tensors(on_cpu, expected)
        for name in here.keys() - on_cpu.keys():  # one at a time: they need not fit beside the model
            changed += changed_tensors({name: here[name].cpu()}, expected)
        self._refuse(changed, len(here))

    def _refuse(self, changed: list[str], count: int) -> None:
        if changed:
            raise CheckpointError(
                f"{self.files[0].parent} is damaged: {sorted(changed)[:4]} ({len(changed)} of {count} tensors) are not "
                "what was written. Fix: save the model again, or restore the files from a copy"
            )


def _is_whole(tensor: Tensor) -> bool:
    """Whether a cast of the model leaves a tensor as it is."""
    return not tensor.is_floating_point()
