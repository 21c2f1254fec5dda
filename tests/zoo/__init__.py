"""Tiny random configurations of many architectures; names are allowed here and nowhere else. And short recipes.

`ZOO` is the core that whole suites run over; `ARCHITECTURES` has it and all others, by family.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qcompile.passes import AWQ, SmoothQuantPlus, SpinQuant
from zoo.architecture import SIZES, Architecture, ids
from zoo.audio import AUDIO
from zoo.core import CORE
from zoo.decoders import DECODERS
from zoo.encoder_decoders import ENCODER_DECODERS
from zoo.encoders import ENCODERS
from zoo.hybrids import HYBRIDS
from zoo.mixtures import MIXTURES
from zoo.plain_torch import PLAIN_TORCH
from zoo.time_series import TIME_SERIES
from zoo.vision import VISION
from zoo.vision_language import VISION_LANGUAGE

__all__ = ["ARCHITECTURES", "FAMILIES", "SIZES", "ZOO", "brief", "build", "example", "is_dynamic"]

FAMILIES: dict[str, dict[str, Architecture]] = {
    "core": CORE,
    "decoders": DECODERS,
    "mixtures of experts": MIXTURES,
    "hybrids": HYBRIDS,
    "encoders": ENCODERS,
    "encoder-decoders": ENCODER_DECODERS,
    "vision": VISION,
    "audio": AUDIO,
    "vision and language": VISION_LANGUAGE,
    "time series": TIME_SERIES,
    "plain torch": PLAIN_TORCH,
}
ARCHITECTURES = {name: found for family in FAMILIES.values() for name, found in family.items()}
LOUD = 0.08  # the standard deviation of matrices of 64 columns that neither shrink nor blow up what they read
ZOO: dict[str, Callable[[], nn.Module]] = {name: found.make for name, found in CORE.items()}


def build(name: str) -> nn.Module:
    """A model with random gains and biases: a gain of one would hide most mistakes.

    Outside of the core, matrices are as large as trained ones too: at 0.02 the embedding is most of the output.
    """
    torch.manual_seed(0)
    make = ZOO[name] if name in ZOO else ARCHITECTURES[name].make
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif name not in ZOO and parameter.numel() > 1 and 0 < (spread := float(parameter.std())) < LOUD:
                parameter.mul_(LOUD / spread)
    return model.requires_grad_(False)


def example(name: str) -> dict[str, Any]:
    """Inputs with two rows."""
    torch.manual_seed(1)
    return ARCHITECTURES[name].inputs() if name in ARCHITECTURES else ids()


def is_dynamic(name: str) -> bool:
    """Whether the architecture takes any length (one that checks its input length does not)."""
    return name not in ARCHITECTURES or ARCHITECTURES[name].dynamic


def brief(recipe):
    """A recipe whose searches are short: what it does is tested, not how well."""
    short = {SpinQuant: {"steps": 4}, AWQ: {"steps": 4}, SmoothQuantPlus: {"step": 0.5}}
    return replace(recipe, passes=tuple(replace(c, **short.get(type(c), {})) for c in recipe.passes))
