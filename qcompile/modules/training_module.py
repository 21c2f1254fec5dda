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

    @abstractmethod
    def settled(self) -> nn.Module:
        """The quantized module for inference that computes what this one does in evaluation mode."""
