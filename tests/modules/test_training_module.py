"""What is in training is refused by what is for quantized models, with its path."""

from __future__ import annotations

import pytest
from torch import nn

from qcompile.modules.training_module import TrainingModule, refuse_training


class Trained(TrainingModule):
    def settled(self):
        return nn.Identity()


def test_the_first_module_in_training_is_named():
    refuse_training(nn.Sequential(nn.Linear(2, 2)), "saving")
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Trained()), Trained())
    with pytest.raises(
        ValueError, match=r"^1\.1 is in training \(Trained\), and saving is for.*qcompile.settle\(model\)"
    ):
        refuse_training(model, "saving")
