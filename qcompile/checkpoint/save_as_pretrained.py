"""transformers' `save_pretrained` for a quantized model: it writes a folder of ours.

What transformers itself would write has codes where `from_pretrained` looks for weights, which it then fills with
random values. So a quantized model has a `save_pretrained` of its own, in front of its class's; `push_to_hub` and
Trainer call it too.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_content import FolderContent
from qcompile.checkpoint.replaced_files import replaced_files
from qcompile.checkpoint.tensor_file import DEFAULT_SHARD
from qcompile.checkpoint.transformers_folder import METHOD
from qcompile.modules.generation_hooks import hooks_of
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.modules.static_quant import StaticQuantConv


def give_save_pretrained(model: nn.Module) -> None:
    """Have a model's `save_pretrained` write a folder of ours; nothing if it has none, or is not quantized."""
    if hasattr(type(model), "save_pretrained") and _is_quantized(model):
        object.__setattr__(model, "save_pretrained", functools.partial(save_as_pretrained, model))


def save_as_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD,
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    **hub: Any,
) -> None:
    """`save_pretrained` of a quantized model; a function of a module, so that a model can be copied and pickled.

    Unlike `qcompile.save` it writes into a folder that exists: files of the same names are replaced, others stay. An
    error while it writes leaves the folder as it was.

    Args:
        model: the model; one with adapters of PEFT writes those, as transformers does.
        save_directory: the folder.
        is_main_process: False writes nothing: another process does.
        state_dict: None; what is stored is read off the model.
        push_to_hub: upload it too, to `repo_id` or the folder's name.
        max_shard_size: the largest size of one file, in bytes or as "5GB".
        variant: None: there is one set of weights.
        token: for the hub.
        save_peft_format: of adapters.
        save_original_format: of adapters; names of tensors are those of the model.
        distributed_checkpoint: False.
        hub: what `push_to_hub` takes.

    Raises:
        CheckpointError: an argument that asks for another format, or as of `qcompile.save`. Nothing is then changed.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        own = type(model).save_pretrained
        own(
            model, save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, variant, token,
            save_peft_format, save_original_format, distributed_checkpoint, **hub,
        )  # fmt: skip
        return
    others = {"state_dict": state_dict is not None, f"variant={variant!r}": variant is not None}
    others |= {"distributed_checkpoint=True": distributed_checkpoint}
    for name, is_set in others.items():
        if is_set:
            raise CheckpointError(
                f"save_pretrained({name}) is not for a model quantized by qcompile: its folder holds the whole model, "
                f"once, read off its modules. Fix: save_pretrained without {name.partition('=')[0]}"
            )
    if not is_main_process:
        return
    content = FolderContent.of(model, max_shard_size)
    with replaced_files(Path(save_directory), content.size) as work:
        content.write(work)
    if push_to_hub:
        repo = hub.pop("repo_id", None) or Path(save_directory).resolve().name
        model.push_to_hub(repo, max_shard_size=max_shard_size, token=token, **hub)


def _is_quantized(model: nn.Module) -> bool:
    kinds = QuantLinear | RotatedLinear | QuantStack | StaticQuantConv
    hooks = hooks_of(model)
    return (
        getattr(model, "quantization_method", None) == METHOD  # what transformers sets when it loads by our quantizer
        or hooks.config is not None
        or hooks.prefix is not None
        or any(isinstance(module, kinds) for module in model.modules())
    )
