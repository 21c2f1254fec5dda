"""Ctrl-C: what a command says that it kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer.core


class Interrupted(Exception):
    """Ctrl-C, with what was kept; no KeyboardInterrupt, which typer ends without a word."""


@contextmanager
def kept(say: Callable[[], str]) -> Iterator[None]:
    """Around work: at Ctrl-C, `say` tells what of it is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(say()) from None


def said_finished(out: Path) -> str:
    """What an interrupted run in parts says of the sites that it finished."""
    unfinished = out.with_name(f"{out.name}.unfinished")
    count = len(list(unfinished.glob("sites/*.safetensors")))
    return f"; {count} finished groups of sites are in {unfinished}: --resume goes on from there" if count else ""


def rows_of(out: Path | None) -> Callable[[], str]:
    """For `kept`: that the rows in a comparison's file are kept, and what continues it."""

    def say() -> str:
        if out is None or not out.exists():
            return "no row was written"
        return f"the rows that were measured are in {out}, and the same command continues"

    return say


class Commands(typer.core.TyperGroup):
    """A group of commands in which Ctrl-C, where no `kept` is, says that nothing was written."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with kept(lambda: "nothing was written"):
            return super().invoke(ctx)
