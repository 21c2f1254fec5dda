"""How one site trains in fixed point: bits, ranges and rounding, as text that a graph can carry.

    w4/a4/g4/signed/sigma/paper/stochastic/alpha=0.01/beta=0.001/stream=0
    w4/a4/g4/unsigned/sigma/paper/stochastic/alpha=0.01/beta=0.001/stream=3/site=blocks.0.weight

Source: arXiv:2407.12637; see numerics/gradient_interval.py for alpha and beta.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Interval = Literal["paper", "quantile", "max", "least_error"]
Ranges = Literal["sigma", "learned", "max"]
GradientRounding = Literal["stochastic", "nearest"]

MIN_BITS, MAX_BITS = 2, 8  # a code is stored as int8
_CHOICES: dict[str, tuple[str, ...]] = {
    "ranges": get_args(Ranges),
    "interval": get_args(Interval),
    "rounding": get_args(GradientRounding),
}


@dataclass(frozen=True)
class FixedPointFormat:
    """Three products of a site in integers: `str(format)` is text that `parse` reads back.

    Attributes:
        weight_bits: of the weight's codes.
        act_bits: of the activation's codes.
        gradient_bits: of the codes of the output's gradient.
        signed: whether activations have codes below zero; without them there are twice as many above.
        ranges: clip of weight and activation: three sigma of each batch, learned, or the largest magnitude.
        interval: how the clip of the gradient is chosen (see numerics/gradient_interval.py).
        rounding: of the gradient.
        alpha: what the paper's condition asks for: the share of gradients beyond the clip is alpha / (2^b - 1).
        beta: how far the clip moves in one step.
        stream: of the random values that round the gradient (see numerics/counter_random.py).
        site: the name of its weight, for messages; "" where it has none.

    Raises:
        ValueError: a value that no site can train with.
    """

    weight_bits: int = 4
    act_bits: int = 4
    gradient_bits: int = 4
    signed: bool = True
    ranges: Ranges = "sigma"
    interval: Interval = "paper"
    rounding: GradientRounding = "stochastic"
    alpha: float = 1e-2
    beta: float = 1e-3
    stream: int = 0
    site: str = ""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "gradient_bits"):
            bits = getattr(self, name)
            if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
                raise ValueError(f"{name} is {bits!r}. Fix: an integer from {MIN_BITS} to {MAX_BITS}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Fix: one of {', '.join(known)}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha is {self.alpha!r}. Fix: above 0 and below 0.5, as 0.01: a share of the gradients")
        if not (0 < self.beta < 1 and math.isfinite(self.beta)):
            raise ValueError(f"beta is {self.beta!r}. Fix: above 0 and below 1, as 0.001")
        if type(self.stream) is not int:
            raise ValueError(f"the stream (from the seed) is {self.stream!r}. Fix: an integer")

    @property
    def weight_levels(self) -> int:
        """The largest code of a weight; the smallest is its negative."""
        return (1 << (self.weight_bits - 1)) - 1

    @property
    def act_levels(self) -> int:
        """The largest code of an activation; at most 127, also without a sign."""
        return (1 << (self.act_bits - 1)) - 1 if self.signed else min((1 << self.act_bits) - 1, 127)

    @property
    def lowest_act(self) -> int:
        """The smallest code of an activation."""
        return -self.act_levels if self.signed else 0

    @property
    def gradient_levels(self) -> int:
        """The largest code of a gradient; the smallest is its negative."""
        return (1 << (self.gradient_bits - 1)) - 1

    @property
    def share(self) -> float:
        """The share of gradients that should lie beyond the clip (paper, eq. 9)."""
        return self.alpha / ((1 << self.gradient_bits) - 1)

    def __str__(self) -> str:
        bits = f"w{self.weight_bits}/a{self.act_bits}/g{self.gradient_bits}"
        sign = "signed" if self.signed else "unsigned"
        words = f"{sign}/{self.ranges}/{self.interval}/{self.rounding}"
        name = f"/site={self.site}" if self.site else ""
        return f"{bits}/{words}/alpha={self.alpha!r}/beta={self.beta!r}/stream={self.stream}{name}"

    @staticmethod
    @functools.cache
    def parse(text: str) -> FixedPointFormat:
        """Read what `str` gives.

        Raises:
            ValueError: any other text.
        """
        try:
            rest, _, site = text.partition("/site=")
            weight, act, gradient, sign, ranges, interval, rounding, alpha, beta, stream = rest.split("/")
            fields: dict[str, Any] = {
                "weight_bits": int(weight.removeprefix("w")),
                "act_bits": int(act.removeprefix("a")),
                "gradient_bits": int(gradient.removeprefix("g")),
                "signed": {"signed": True, "unsigned": False}[sign],
                "ranges": ranges,
                "interval": interval,
                "rounding": rounding,
                "alpha": float(alpha.removeprefix("alpha=")),
                "beta": float(beta.removeprefix("beta=")),
                "stream": int(stream.removeprefix("stream=")),
                "site": site,
            }
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{text!r} is no fixed-point format. Fix: write it as {str(FixedPointFormat())!r}"
            ) from error
        return FixedPointFormat(**fields)
