"""What loading a checkpoint changes in a model, planned and checked as a whole before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_meta import FolderMeta
from qcompile.checkpoint.model_state import Slot, apply_scalars, slots
from qcompile.checkpoint.module_entries import build, describe, replaced_parameters
from qcompile.ir.quantized_stacks import STACK_SUFFIX
from qcompile.modules.fast_paths import leave_fast_paths
from qcompile.modules.kv_constants import CENTERS, PREFIX, SCALES
from qcompile.modules.quant_experts import QuantStack, replace_parameter

_FIX = "Fix: pass the float model that was quantized"
_CONSTANTS = {"Prefix": PREFIX, "Centers": CENTERS, "Scales": SCALES}


@dataclass
class FillPlan:
    """Everything that `apply` does.

    Attributes:
        model: the float model.
        meta: of the checkpoint.
        modules: path -> module that is put there.
        fills: tensors that replace others, with their places.
        added: attribute path -> tensor that the float model has no place for yet.
    """

    model: nn.Module
    meta: FolderMeta
    modules: dict[str, nn.Module] = field(default_factory=dict)
    fills: list[tuple[Slot, Tensor]] = field(default_factory=list)
    added: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, meta: FolderMeta, stored: Mapping[str, Tensor], root: Path) -> FillPlan:
        """Plan it.

        Args:
            model: the float model; not changed.
            meta: of the checkpoint.
            stored: its tensors.
            root: its folder, for messages.

        Raises:
            CheckpointError: the tensors are not those of the model, or not as their formats demand.
        """
        plan = FillPlan(model, meta)
        _refuse_quantized(model)
        pool = _with_shared(stored, meta)
        leaves: dict[str, list[str]] = defaultdict(list)
        for name in pool:
            path, _, leaf = name.rpartition(".")
            leaves[path].append(leaf)
        for path, entry in meta.modules.items():
            if entry.get("kind") == "Alias":
                plan._check_alias(path, entry.get("of"))
                continue
            inner = plan._place_of(path, entry.get("kind"))
            parts = {leaf: pool.pop(f"{path}.{leaf}") for leaf in leaves[path]}
            plan.modules[path] = build(path, entry, parts, inner)
        plan._fill(pool, root)
        return plan

    def apply(self) -> None:
        """Do it. Nothing here depends on data that was not checked."""
        parameters: dict[int, nn.Parameter] = {}  # one for all places of a tied tensor

        def parameter(tensor: Tensor) -> nn.Parameter:
            return parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))

        for slot, tensor in self.fills:
            if slot.kind == "parameter":
                slot.module._parameters[slot.leaf] = parameter(tensor)
            elif slot.kind == "attribute":
                vars(slot.module)[slot.leaf] = tensor
            else:
                slot.module._buffers[slot.leaf] = tensor
        for name, tensor in self.added.items():
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            if name in self.meta.computed:
                put_computed(owner, leaf, tensor)
            else:
                setattr(owner, leaf, parameter(tensor))
        for path, module in self.modules.items():
            self._put(path, module)
        for path, entry in self.meta.modules.items():
            if entry["kind"] == "Alias":
                self._put(path, self.model.get_submodule(entry["of"]))
        apply_scalars(self.model, self.meta.scalars)

    def _put(self, path: str, module: nn.Module) -> None:
        if isinstance(module, QuantStack):
            owner, _, leaf = path.removesuffix(STACK_SUFFIX).rpartition(".")
            if f"{leaf}{STACK_SUFFIX}" not in self.model.get_submodule(owner)._modules:
                replace_parameter(self.model, path.removesuffix(STACK_SUFFIX), module)
        elif path in _CONSTANTS.values():
            self.model.add_module(path, module)
        else:
            self.model.set_submodule(path, module)
            leave_fast_paths(self.model, path)

    def _place_of(self, path: str, kind: object) -> nn.Module | None:
        """The float module that an entry stands for; None of entries that stand for a parameter, or for none."""
        if kind == "QuantStack":
            parameter = path.removesuffix(STACK_SUFFIX)
            if parameter == path or parameter not in dict(self.model.named_parameters(remove_duplicate=False)):
                _refuse_path(path, "no stack of experts")
            return None
        if isinstance(kind, str) and kind in _CONSTANTS:
            if path != _CONSTANTS[kind]:
                _refuse_path(path, f"no place of {kind}")
            return None
        try:
            if path:
                return self.model.get_submodule(path)
        except AttributeError:
            pass
        _refuse_path(path, "no module of the model")

    def _check_alias(self, path: str, of: object) -> None:
        if not isinstance(of, str) or of not in self.modules or not path:
            _refuse_path(path, f"no other place of {of!r}")
        kind = self.meta.modules[of]["kind"]
        if kind != "QuantStack":
            self._place_of(path, kind)

    def _fill(self, pool: dict[str, Tensor], root: Path) -> None:
        """Plan for the tensors that are in no module of ours."""
        own = self._float_slots()
        missing = [n for n, slot in own.items() if n not in pool and slot.kind in ("parameter", "buffer")]
        misfit = [n for n, slot in own.items() if n in pool and not _fits(slot, pool[n])]
        unknown = []
        for name, tensor in pool.items():
            if name in own:
                self.fills.append((own[name], tensor))
            elif self._takes(name, tensor):
                self.added[name] = tensor
            else:
                unknown.append(name)
        if missing or misfit or unknown:
            raise CheckpointError(
                f"{root} holds another model: missing {missing[:4]}, of another shape or dtype {misfit[:4]}, "
                f"unknown {unknown[:4]}. {_FIX}"
            )
        first: dict[tuple[int, str], Tensor] = {}
        for slot, tensor in self.fills:
            if first.setdefault((id(slot.module), slot.leaf), tensor) is not tensor:
                raise CheckpointError(
                    f"{root} holds two tensors for one place, {type(slot.module).__name__}.{slot.leaf}: the model "
                    f"shares a module that was saved as two. {_FIX}"
                )

    def _float_slots(self) -> dict[str, Slot]:
        """The places of tensors that stay: by the names that they have in the checkpoint."""
        kinds = {path: entry["kind"] for path, entry in self.meta.modules.items()}
        parameters = replaced_parameters(self.meta.modules)
        parameters |= {
            path.removesuffix(STACK_SUFFIX)
            for path, entry in self.meta.modules.items()
            if entry["kind"] == "Alias" and kinds[entry["of"]] == "QuantStack"
        }
        result = {}
        for name, slot in slots(self.model).items():
            above = next((p for p in _parents(name) if p in kinds), None)
            if name in parameters or (above is not None and kinds[above] != "RotatedLinear"):
                continue
            result[name if above is None else f"{above}.inner.{name[len(above) + 1 :]}"] = slot
        return result

    def _takes(self, name: str, tensor: Tensor) -> bool:
        """Whether the model has a module for a tensor that it does not have: a computed one, or a folded bias."""
        path, _, leaf = name.rpartition(".")
        try:
            owner = self.model.get_submodule(path)
        except AttributeError:
            return False
        if name in self.meta.computed:
            return leaf.isidentifier() and getattr(owner, leaf, None) is None  # what a call leaves there
        is_bias = leaf == "bias" and hasattr(owner, "bias") and owner.bias is None
        return is_bias and tensor.ndim == 1 and tensor.is_floating_point()


def put_computed(owner: nn.Module, leaf: str, value: Tensor) -> None:
    """Put a tensor that no state_dict has into a module: where a plain attribute is, as such, else as a buffer."""
    if leaf in vars(owner):
        vars(owner)[leaf] = value
    else:
        owner._buffers.pop(leaf, None)
        owner.register_buffer(leaf, value, persistent=False)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _with_shared(stored: Mapping[str, Tensor], meta: FolderMeta) -> dict[str, Tensor]:
    """All tensors by name, tied ones as the same object; but those of modules of ours are copies."""
    pool = dict(stored)
    for name, owner in meta.shared.items():
        if name in stored or owner not in stored:
            raise CheckpointError(f"{name!r} is said to be tied to {owner!r}, which is not stored so. Fix: save again")
        ours = meta.modules.get(name.rpartition(".")[0], {}).get("kind", "RMSNorm") != "RMSNorm"
        pool[name] = stored[owner].clone() if ours else stored[owner]
    return pool


def _fits(slot: Slot, tensor: Tensor) -> bool:
    """Whether a tensor can be where another is. Computed ones may have grown; floats may be of another dtype."""
    same_shape = slot.tensor.shape == tensor.shape or slot.kind in ("computed", "attribute")
    floats = slot.tensor.is_floating_point() and tensor.is_floating_point()
    return same_shape and (floats or slot.tensor.dtype == tensor.dtype)


def _refuse_quantized(model: nn.Module) -> None:
    for path, module in model.named_modules():
        entry = describe(module)
        if entry is not None and entry["kind"] != "RMSNorm":
            raise CheckpointError(f"the model that is to be filled is quantized already ({path!r}). {_FIX}")


def _refuse_path(path: str, reason: str) -> NoReturn:
    raise CheckpointError(f"{path!r} of the checkpoint is {reason}. {_FIX}")
