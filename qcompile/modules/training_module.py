"""What all modules that are trained in low precision have in common: they can be settled for inference."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from qcompile.modules.fixed_dtype import FixedDtypeModule


class TrainingModule(FixedDtypeModule):
    """A module that `qcompile.train` or `qcompile.qa_lora` put in the place of another.

    Its parameters are what an optimizer trains; whatever else training changes are buffers, so that `state_dict` holds
    all of it and a resumed run goes on bit for bit.
    """

    SETTLED_BY = "qcompile.settle(model)"

    @abstractmethod
    def settled(self) -> nn.Module:
        """The quantized module for inference that computes what this one does in evaluation mode.

        Raises:
            ValueError: there is none; without the name of the module, which the caller adds.
        """


def refuse_training(model: nn.Module, what: str) -> None:
    """Refuse to do something with a model in training that is for quantized models.

    Args:
        model: any model.
        what: is refused.

    Raises:
        ValueError: with the first module in training.
    """
    for path, module in model.named_modules():
        settled_by = getattr(type(module), "SETTLED_BY", None)
        if settled_by is not None:
            raise ValueError(
                f"{path} is in training ({type(module).__name__}), and {what} is for models that are not. "
                f"Fix: {settled_by} first. A run in training is stored by torch.save(model.state_dict(), f)"
            )
