"""The base of every pass's config: frozen data that a recipe holds and JSON can carry."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qcompile.numerics.format import Format


@dataclass(frozen=True)
class PassConfig:
    """A frozen dataclass whose fields are plain data or formats; a format may be given as text ("int4/group128")."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and "Format" in str(field.type):
                object.__setattr__(self, field.name, Format.parse(value))
