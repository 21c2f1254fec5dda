"""The base of every pass's config: frozen data that a recipe holds and JSON can carry."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args, get_type_hints

from qcompile.numerics.format import Format

ONLY_WHERE_SET = MappingProxyType({"only where set": True})
"""Metadata of a field that JSON names only where it is not the default, so that earlier versions read the others."""


@dataclass(frozen=True)
class PassConfig:
    """A frozen dataclass whose fields are plain data or formats; a format may be given as text ("int4/group128").

    Raises:
        ValueError: text that is no format.
    """

    def __post_init__(self) -> None:
        for name in _format_fields(self.__class__):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Format.parse(value))


@functools.cache
def _format_fields(config: type) -> tuple[str, ...]:
    """Names of the fields that hold a format, or a format or None."""
    return tuple(name for name, hint in get_type_hints(config).items() if Format in (hint, *get_args(hint)))
