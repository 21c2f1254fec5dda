"""`settle(model)`: from a model in training to an ordinary quantized model, which saves, exports and compiles."""

from __future__ import annotations

from torch import nn

from qcompile.api.model_wrappers import inner_model
from qcompile.checkpoint.save_as_pretrained import give_save_pretrained
from qcompile.modules.take_place import take_place
from qcompile.modules.training_module import TrainingModule, refuse_training
from qcompile.recipe.rule import RecipeError

_WHOLE = (
    "read the whole state by torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
    "StateDictOptions(full_state_dict=True)), load it into a model that was prepared in the same way and is not "
    "sharded, and settle that"
)


def settle(model: nn.Module) -> None:
    """Replace, in place, what `train` and `qa_lora` put into a model by quantized modules for inference.

    The result computes what the model computed in evaluation mode. Adapters are merged into float zero points, exactly
    (numerics/zero_shift.py); the merged weights are compared with the sum in float64.

    Args:
        model: prepared by `qcompile.train` or `qcompile.qa_lora`; trained or not.

    Raises:
        RecipeError: nothing in the model is in training, or a module cannot be settled (NaN in an adapter). The model
            is then as it was. Parameters are sharded (FSDP).
    """
    model = inner_model(model, _WHOLE)
    training = training_modules(model)
    if not training:
        refuse_training(model, "qcompile.settle")  # adapters of PEFT
        raise RecipeError(
            f"{type(model).__name__} has nothing to settle: no module of it is in training. "
            "Fix: call it after qcompile.train or qcompile.qa_lora, once"
        )
    settled = [(module, _settled(path, module)) for path, module in training.items()]
    for old, new in settled:
        take_place(model, old, new)
    give_save_pretrained(model)
    model.requires_grad_(False)


def _settled(path: str, module: TrainingModule) -> nn.Module:
    try:
        return module.settled()
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def training_modules(model: nn.Module) -> dict[str, TrainingModule]:
    """The modules of a model that are in training, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainingModule)}


def check_not_in_training(model: nn.Module) -> None:
    """Refuse a model that was prepared already.

    Raises:
        RecipeError: with the first module that is in training.
    """
    prepared = list(training_modules(model))
    if prepared:
        raise RecipeError(
            f"{type(model).__name__} is in training already ({len(prepared)} modules, the first is {prepared[0]}). "
            "Fix: go on with it, or qcompile.settle(model) first"
        )
