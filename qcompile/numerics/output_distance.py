"""How far the output of a quantized model is from the float model's, on one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.numerics.divergence import kl_divergence

ENOUGH_TOKENS = 128
"""Of fewer tokens a share of agreements says little."""


@dataclass(frozen=True)
class OutputDistance:
    """A distance of outputs.

    Attributes:
        error: |q - f| / |f| over all floating-point outputs; infinite where q is not finite and f is.
        tokens: of the logits; 0 without logits.
        agreement: share of tokens whose most likely token is the same, 0 to 1.
        divergence: mean KL(float || quantized) of the logits, nats per token.
    """

    error: float
    tokens: int = 0
    agreement: float = 1.0
    divergence: float = 0.0

    @staticmethod
    def between(reference: Sequence[Tensor], outputs: Sequence[Tensor], logits: int | None) -> OutputDistance:
        """Compare outputs.

        Args:
            reference: of the float model.
            outputs: of the quantized model, the same in number and shapes.
            logits: which of them are logits [.., V]; None: none.
        """
        difference = norm = 0.0
        for f, q in zip(reference, outputs, strict=True):
            if f.is_floating_point():
                finite = torch.isfinite(f)
                difference += float((q - f)[finite].double().square().sum())
                norm += float(f[finite].double().square().sum())
        error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
        error = math.inf if math.isnan(error) else error
        if logits is None or reference[logits].ndim < 2:
            return OutputDistance(error)
        f, q = reference[logits], outputs[logits]
        same = (f.argmax(-1) == q.argmax(-1)).double().mean()
        return OutputDistance(error, f[..., 0].numel(), float(same), float(kl_divergence(f, q)))

    @property
    def size(self) -> float:
        """What two distances are compared by: the divergence of logits, which says what is lost, or else the error."""
        return self.divergence if self.tokens else self.error

    def __str__(self) -> str:
        logits = f", {self.divergence:.2g} nats per token" if self.tokens else ""
        return f"relative error {self.error:.2g}{logits}"

    def metrics(self) -> dict[str, float]:
        """The figures by the names that a report prints."""
        found = {"relative error of the output": self.error}
        if self.tokens:
            found["top-1 agreement"] = self.agreement
            found["KL divergence, nats per token"] = self.divergence
            found["compared tokens"] = self.tokens
        return found
