"""All tensors of a model by name: parameters, buffers, those that no state_dict has, and which are tied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.module_entries import describe
from qcompile.checkpoint.tensor_file import CODES, digests
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.modules.static_quant import StaticQuantConv
from qcompile.modules.wrappers import unwrapped

Kind = Literal["parameter", "buffer", "computed", "attribute"]
"""A computed tensor is a buffer that is not persistent, an attribute no buffer at all: both are saved as well."""

_WRAPPER = "_orig_mod."  # what torch.compile puts before the names of a module's tensors
_PLAIN = (Tensor, nn.Parameter, StoredTensor)


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a model.

    Attributes:
        module: the module.
        leaf: the attribute.
        kind: what it is there.
        tensor: the tensor that is there now.
    """

    module: nn.Module
    leaf: str
    kind: Kind
    tensor: Tensor


@dataclass
class ModelState:
    """What a checkpoint stores of a model.

    Attributes:
        tensors: by name, each once.
        shared: name of a tied tensor -> the name that has it.
        modules: path -> entry (module_entries.py).
        computed: names of tensors that no state_dict has.
        scalars: path of a module that has such tensors -> its attributes that are plain values.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    scalars: dict[str, dict[str, bool | int | float]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> ModelState:
        """Collect it.

        Raises:
            CheckpointError: something that no checkpoint can store; the text names it.
        """
        state = ModelState()
        entries: dict[int, str] = {}  # modules of ours -> the path that has them
        aliases: list[str] = []
        owners: dict[tuple[Any, ...], str] = {}
        for path, module in _modules(model):
            _refuse_extra_state(path, module)
            if any(path.startswith(alias) for alias in aliases):
                continue
            entry = describe(module)
            if entry is not None and id(module) in entries:
                state.modules[path] = {"kind": "Alias", "of": entries[id(module)]}
                aliases.append(f"{path}.")
                continue
            if entry is not None:
                entries[id(module)], state.modules[path] = path, entry
            for name, slot in _slots_of(path, module):
                _refuse_unstorable(name, slot.tensor)
                key = _identity(slot.tensor)
                # Codes, scales and signs are stored for each site: a tie is the float model's.
                kinds = (QuantLinear, QuantStack, RotatedLinear, StaticQuantConv)
                alone = isinstance(module, kinds) or not slot.tensor.numel()
                if slot.kind in ("computed", "attribute"):
                    state.computed.append(name)
                    state.scalars[path] = _scalars(module)
                if not alone and owners.setdefault(key, name) != name:
                    state.shared[name] = owners[key]
                else:
                    state.tensors[name] = slot.tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        state._separate()
        return state

    def _separate(self) -> None:
        """Tensors that are stored one by one share no memory; computed ones with the same content are stored once."""
        visited: set[int] = set()
        for name, tensor in self.tensors.items():
            if isinstance(tensor, StoredTensor):  # has no memory
                continue
            storage = tensor.untyped_storage().data_ptr()
            if tensor.numel() and storage in visited:
                self.tensors[name] = tensor.clone()
            visited.add(storage)
        first: dict[str, str] = {}
        for name, digest in digests({n: self.tensors[n] for n in self.computed if n in self.tensors}).items():
            owner = first.setdefault(digest, name)
            if owner != name and torch.equal(self.tensors[owner], self.tensors[name]):
                self.shared[name] = owner
                del self.tensors[name]


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every tensor of a model by name."""
    return {name: slot for path, module in _modules(model) for name, slot in _slots_of(path, module)}


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, those that stand in several places as often; without torch.compile around parts."""
    for path, module in model.named_modules(remove_duplicate=False):
        if f"{path}.".endswith(f".{_WRAPPER}") or f"{path}." == _WRAPPER:
            module = unwrapped(module)
        yield f"{path}.".replace(_WRAPPER, "").removesuffix("."), module


def _slots_of(path: str, module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """The tensors of one module, without those of its children."""
    prefix = f"{path}." if path else ""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + leaf, Slot(module, leaf, "parameter", parameter)
    for leaf, buffer in module._buffers.items():
        if buffer is not None:
            kind: Kind = "computed" if leaf in module._non_persistent_buffers_set else "buffer"
            yield prefix + leaf, Slot(module, leaf, kind, buffer)
    for leaf, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + leaf, Slot(module, leaf, "attribute", value)


def _scalars(module: nn.Module) -> dict[str, bool | int | float]:
    """What a module knows of the tensors that it computes, as the length that a table reaches."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and type(value) in (bool, int, float)
    }


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory, read alike."""
    storage, signs = tensor.untyped_storage(), (tensor.is_conj(), tensor.is_neg())
    return storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, signs


def _refuse_unstorable(name: str, tensor: Tensor) -> None:
    reason, fix = None, "save a model whose tensors are all in memory and plain"
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
        reason = f"is a {type(tensor).__name__} of layout {tensor.layout}, and only plain tensors are stored"
    elif tensor.device.type == "meta":
        reason = "has no values (it is on the meta device: offloaded, or not loaded yet)"
    elif tensor.dtype not in CODES:
        near = "torch.complex64" if tensor.is_complex() else "torch.float32"
        reason, fix = f"is {tensor.dtype}, which safetensors files do not have", f"make it {near}"
    if reason is not None:
        raise CheckpointError(f"{name!r} {reason}. Fix: {fix}")


def _refuse_extra_state(path: str, module: nn.Module) -> None:
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise CheckpointError(
            f"{path!r} ({type(module).__name__}) has an extra state, which is no tensor. Fix: save it by torch.save"
        )


def apply_scalars(model: nn.Module, scalars: Mapping[str, Mapping[str, bool | int | float]]) -> None:
    """Give modules back their plain values; one that a module does not have, or has otherwise, is not set."""
    modules = dict(_modules(model))
    for path, values in scalars.items():
        for name, value in values.items():
            if path in modules and type(vars(modules[path]).get(name)) is type(value):
                setattr(modules[path], name, value)
