"""transformers' own `save_pretrained` of a model in training: what its Trainer writes and resumes from.

Such a folder has codes where `from_pretrained` looks for weights, which it would fill with random values. So its
config.json names a weights file that does not exist, which `from_pretrained` refuses; Trainer reads the tensors by
`load_state_dict` into a model that was prepared in the same way, and does not look there.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.modules.training_module import TrainingModule

_MARKS = {
    "quantization_config": {"quant_method": "qcompile"},
    "transformers_weights": "none for from_pretrained: a run in training, to be resumed after qcompile.train",
}


def mark_training_folders(model: nn.Module) -> None:
    """Make a model's `save_pretrained` mark its folders; nothing if it has none, or no module in training."""
    if _in_training(model) and hasattr(type(model), "save_pretrained"):
        object.__setattr__(model, "save_pretrained", functools.partial(save_in_training, model))


def save_in_training(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of a model's class, and the mark. A function of a module, so that a model can be copied.

    Args:
        model: of transformers, in training.
        save_directory: the folder.
        args: as of `save_pretrained`.
        kwargs: as of `save_pretrained`.

    Raises:
        CheckpointError: the folder was to be pushed to a hub.
    """
    if kwargs.get("push_to_hub") and _in_training(model):
        raise CheckpointError(
            "save_pretrained of a model in training writes what only Trainer resumes from, which is nothing for a hub. "
            "Fix: qcompile.settle(model), qcompile.save(model, folder)"
        )
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    path = Path(save_directory) / "config.json"
    if not _in_training(model):  # it was settled, to a float model
        return
    if path.is_file() and kwargs.get("is_main_process", not args or args[0]):
        data = json.loads(path.read_text(encoding="utf-8")) | _MARKS
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _in_training(model: nn.Module) -> bool:
    return any(isinstance(module, TrainingModule) for module in model.modules())
