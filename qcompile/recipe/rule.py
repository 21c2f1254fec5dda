"""Rules: what to do with the sites whose names match a glob."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from qcompile.numerics.format import Format
from qcompile.recipe.pass_config import PassConfig


class RecipeError(ValueError):
    """A recipe that cannot run; the text lists every fault with its fix."""


@dataclass(frozen=True)
class Rule(PassConfig):
    """What to do with the sites whose weight's attribute path matches a glob.

    Attributes:
        match: a glob over weight names ("*.experts.*"); `*` crosses dots.
        keep: keep the site float.
        weight: the weight's format in place of the recipe's; None keeps the recipe's own.
        act: the activation's format in place of the recipe's; None keeps the recipe's own.

    Raises:
        RecipeError: a rule that contradicts itself or does nothing.
    """

    match: str
    keep: bool = False
    weight: Format | None = None
    act: Format | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep and (self.weight or self.act):
            raise RecipeError(
                f"rule {self.match!r} keeps the site float and gives it a format too. Fix: drop keep, or the formats"
            )
        if self.act is not None and self.act.scale != "f32":
            raise RecipeError(
                f"rule {self.match!r} gives activations {self.act}, whose scales are not stored. "
                f"Fix: drop {self.act.scale}"
            )
        if not (self.keep or self.weight or self.act):
            raise RecipeError(f"rule {self.match!r} does nothing. Fix: give keep=True, weight= or act=")

    def matches(self, *names: str) -> bool:
        """Whether the glob matches any of a site's names."""
        return any(fnmatch.fnmatchcase(name, self.match) for name in names)
