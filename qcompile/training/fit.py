"""One run of training on windows of text, by the Trainer of transformers: checkpoints, resuming, a curve of the loss.

Used by the command line; a program of one's own uses Trainer, or any loop, in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qcompile.evaluation.plots import plot_file

if TYPE_CHECKING:
    from transformers import Trainer

LOSSES = "loss.json"
CURVE = "loss.png"


@dataclass(frozen=True)
class Fit:
    """How to train.

    Attributes:
        steps: of the optimizer.
        lr: the learning rate after the warm-up; it falls along a cosine to a tenth of itself.
        batch: windows of one forward pass.
        accumulate: forward passes of one step.
        clip: largest norm of the gradient; 0 for any.
        save_every: steps between checkpoints.
        seed: of the order of windows.
    """

    steps: int = 100
    lr: float = 1e-3
    batch: int = 4
    accumulate: int = 1
    clip: float = 1.0
    save_every: int = 50
    seed: int = 0

    def run(
        self,
        model: nn.Module,
        windows: Sequence[Tensor],
        folder: Path,
        *,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        resume: bool = False,
        tell_step: Callable[[int, float], None] = lambda _step, _loss: None,
    ) -> list[tuple[int, float]]:
        """Train a causal language model of transformers (or one with adapters of PEFT).

        Args:
            model: changed in place.
            windows: token ids [1, length] each.
            folder: gets checkpoints, and the losses as JSON and as a plot.
            make_optimizer: makes an optimizer of the parameters that require gradients; default: AdamW without decay.
            resume: go on from the newest checkpoint of the folder.
            tell_step: called with step and loss.

        Returns:
            (step, loss) of every step, those before a resumption among them.

        Raises:
            ValueError: nothing to resume, or no parameter to train.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient: nothing to train")
        last = newest_checkpoint(folder)
        if resume and last is None:
            raise ValueError(f"{folder} has no checkpoint to go on from. Fix: drop --resume")
        make = make_optimizer or (lambda chosen: torch.optim.AdamW(chosen, lr=self.lr, weight_decay=0.0))
        optimizer = make(parameters)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_lr)
        trainer = self._trainer(model, windows, folder, (optimizer, schedule), tell_step)
        trainer.train(resume_from_checkpoint=str(last) if resume else None)
        losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        (folder / LOSSES).write_text(json.dumps([{"step": step, "loss": loss} for step, loss in losses]) + "\n")
        return losses

    def _share_of_lr(self, step: int) -> float:
        warmup = max(self.steps // 10, 1)
        if step < warmup:
            return (step + 1) / warmup
        done = torch.tensor((step - warmup) / max(self.steps - warmup, 1) * torch.pi)
        return 0.1 + 0.45 * (1 + float(torch.cos(done)))

    def _trainer(
        self, model: nn.Module, windows: Sequence[Tensor], folder: Path, optimizers: Any,
        tell_step: Callable[[int, float], None],
    ) -> Trainer:  # fmt: skip
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        rate = self.lr

        class Progress(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if not logs or "loss" not in logs:
                    return
                loss, step = float(logs["loss"]), state.global_step
                if not math.isfinite(loss):  # before a checkpoint of it is written
                    raise ValueError(
                        f"the loss of step {step} is {loss}. Fix: a smaller learning rate than {rate:g}, from the "
                        "beginning; or go on from the checkpoint before it"
                    )
                tell_step(step, loss)

        arguments = TrainingArguments(
            str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch,
            gradient_accumulation_steps=self.accumulate,
            max_grad_norm=self.clip,
            save_steps=self.save_every,
            save_total_limit=2,
            logging_steps=1,
            logging_nan_inf_filter=False,
            seed=self.seed,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer copies the model, and the state of copies is lost
        data = [{"input_ids": window[0], "labels": window[0]} for window in windows]
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=optimizers, callbacks=[Progress()])
        trainer.remove_callback(PrinterCallback)
        return trainer


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the last step in a folder of a run, or None."""
    written = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))  # Trainer writes it last
    found = [path for path in written if path.name.rpartition("-")[2].isdigit()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Sequence[Tensor]) -> float:
    """The mean loss over windows [1, length], in nats per token."""
    mode = model.training
    model.eval()
    try:
        device = next(iter(model.parameters())).device
        on_device = (window.to(device) for window in windows)
        return sum(float(model(input_ids=window, labels=window).loss) for window in on_device) / len(windows)
    finally:
        model.train(mode)


def plot_losses(losses: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw the loss of every step, and its running mean over a tenth of the steps."""
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    width = max(len(values) // 10, 1)
    means = [sum(values[max(i - width + 1, 0) : i + 1]) / min(i + 1, width) for i in range(len(values))]
    with plot_file(path) as axes:
        axes.plot(steps, values, color="0.75", label="each step")
        axes.plot(steps, means, label=f"mean of {width} steps")
        axes.set(xlabel="step", ylabel="loss, nats per token")
        axes.legend()
