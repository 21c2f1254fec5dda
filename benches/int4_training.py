"""Training in 4-bit integers: accuracy of a small ResNet, by the interval that gradients are rounded in.

    python benches/int4_training.py [--seeds N] [--epochs N] [--only NAME ..]      writes results/int4_training.json

MNIST-1D (arXiv:2011.14439; the package mnist1d generates it, 4000 samples to train and 8000 to test), a ResNet of 12
convolutions in 4 bits of 8 to 32 channels, first convolution and last linear float. SGD 0.1 with momentum 0.9, decay
1e-4, batches of 128, the rate divided by ten after half and three quarters of the steps: arXiv:2407.12637's for CIFAR.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import qcompile
from qcompile.cli.output import print_table
from qcompile.memory.environment import versions
from qcompile.modules.fixed_point_modules import FixedPointModule
from qcompile.numerics.fixed_point_operand import batch_range, operand_codes, step_of
from qcompile.passes import FixedPoint

OUT = Path(__file__).parent / "results" / "int4_training.json"
BATCH = 128
FIXED: dict[str, FixedPoint] = {
    "max": FixedPoint(interval="max"),
    "paper, alpha 0.01": FixedPoint(alpha=1e-2),
    "quantile, alpha 0.01": FixedPoint(interval="quantile", alpha=1e-2),
    "least error": FixedPoint(interval="least_error"),
}
VARIANTS = ("float", "4 bits, float gradients", *FIXED)


class Block(nn.Module):
    """Two convolutions and a shortcut, whose new channels are zeros."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm1d(out)
        self.conv2, self.norm2 = nn.Conv1d(out, out, 3, 1, 1, bias=False), nn.BatchNorm1d(out)
        self.stride, self.more = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, O, L / stride]."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride], (0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """Six blocks of 8, 16 and 32 channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(1, width, 3, padding=1, bias=False), nn.BatchNorm1d(width)
        blocks, channels = [], width
        for level in range(3):
            for first in (True, False):
                blocks.append(Block(channels, width << level, 2 if first and level else 1))
                channels = width << level
        self.blocks, self.last = nn.Sequential(*blocks), nn.BatchNorm1d(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, L] -> logits [B, 10]."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(self.last(x.mean(-1)))
        return logits


class RoundedConv(nn.Module):
    """The same rounding of weight and activation, and float gradients; evaluated with the range of each batch."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, O, L']."""
        return F.conv1d(
            rounded(x, 15, signed=False), rounded(self.conv.weight, 7, signed=True), None, self.conv.stride, 1
        )


def rounded(x: Tensor, levels: int, *, signed: bool) -> Tensor:
    """x on its codes; the gradient is that of the clamp."""
    clip = batch_range(x.detach(), "sigma", signed)
    low = -levels if signed else 0
    codes, step = operand_codes(x.detach(), step_of(clip, levels), low, levels)
    clamped = torch.minimum(torch.maximum(x, clip * (low / levels)), clip)
    return clamped + (codes * step - clamped).detach()


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels to train on, and to test on."""
    from mnist1d.data import get_dataset_args, make_dataset

    options = get_dataset_args()
    options.num_samples, options.train_split = 12000, 1 / 3
    made = make_dataset(options)
    x, test = (torch.tensor(made[name]).float()[:, None] for name in ("x", "x_test"))
    return x, torch.tensor(made["y"]), test, torch.tensor(made["y_test"])


def prepared(variant: str, seed: int, example: Tensor) -> nn.Module:
    """The network of one variant."""
    torch.manual_seed(seed)
    model = ResNet()
    if variant in FIXED:
        recipe = qcompile.Recipe(variant, (FIXED[variant],))
        qcompile.train(model, recipe, example=example, progress=False)
        count = sum(isinstance(module, FixedPointModule) for module in model.modules())
        assert count == 12, f"{count} convolutions train in 4 bits"
    elif variant != "float":
        for module in model.modules():
            if isinstance(module, Block):
                module.conv1, module.conv2 = RoundedConv(module.conv1), RoundedConv(module.conv2)
    return model.train()


def run(variant: str, seed: int, epochs: int, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Train one network; test accuracy, mean loss of the last epoch, and where gamma ended."""
    x, labels, test, expected = given
    model = prepared(variant, seed, x[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * steps // 2, epochs * steps * 3 // 4], 0.1)
    losses: list[float] = []
    torch.manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        accuracy = (model(test).argmax(1) == expected).float().mean().item()
    gammas = [round(float(m.gamma), 3) for m in model.modules() if isinstance(m, FixedPointModule)]
    if variant in FIXED:  # what is deployed is what was measured
        with torch.no_grad():
            before = model(test[:500])
            qcompile.settle(model)
            assert torch.equal(model(test[:500]), before)
    return dict(variant=variant, seed=seed, accuracy=accuracy, loss=mean(losses[-steps:]), gammas=gammas)


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=VARIANTS, choices=VARIANTS)
    options = parser.parse_args()
    given = data()
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for variant in options.only:
            runs.append(run(variant, seed, options.epochs, given))
            print(json.dumps(runs[-1]), flush=True)
    rows = []
    table = Table("variant", "test accuracy", "+-", "last loss")
    for variant in options.only:
        mine = [entry for entry in runs if entry["variant"] == variant]
        accuracies = [entry["accuracy"] for entry in mine]
        spread = stdev(accuracies) if len(mine) > 1 else 0.0
        row = dict(
            variant=variant, accuracy=mean(accuracies), spread=spread, loss=mean(entry["loss"] for entry in mine),
        )  # fmt: skip
        rows.append(row)
        table.add_row(variant, f"{row['accuracy']:.4f}", f"{spread:.4f}", f"{row['loss']:.4f}")
    print_table(table)
    if set(options.only) == set(VARIANTS):
        found = versions() | {"mnist1d": metadata.version("mnist1d")}
        result = dict(versions=found, seeds=options.seeds, epochs=options.epochs, rows=rows, runs=runs)
        OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
