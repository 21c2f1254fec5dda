"""A file that appears whole or not at all, with the file that a link names in place of the link."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file by way of a temporary sibling, so that a reader, or an interruption, finds the old or the new.

    A link stays and the file that it names is replaced. A pipe or a device receives the text. Folders are made.

    Raises:
        OSError: the file cannot be written; what was there is unchanged.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_text(text, encoding="utf-8")
        return
    sibling = target.parent / f".{secrets.token_hex(8)}.partial"
    try:
        with open(sibling, "x", encoding="utf-8") as file:
            file.write(text)
        if target.exists():
            shutil.copymode(target, sibling)
        os.replace(sibling, target)
    finally:
        sibling.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends well, and vanishes otherwise.

    It has the name of `path`, in a folder of its own beside it. Folders are made. A link stays and the file that it
    names is replaced.

    Raises:
        OSError: the file cannot be written; what was there is unchanged.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder) / target.name
        if target.exists():
            shutil.copymode(target, Path(folder) / target.name)
        os.replace(Path(folder) / target.name, target)


def check_writable(path: str | Path) -> None:
    """Check that a file or folder can be made or replaced here: before long work, whose result would have no place.

    Nothing is left behind. Folders above it that do not exist yet are not made.

    Raises:
        ValueError: it cannot; the text names the path, the reason and the fix.
    """
    try:
        target = Path(path).resolve()
        above = target.parent
        while not above.exists():
            above = above.parent
        for part in target.relative_to(above).parts:
            (above / part).exists()  # raises where the name is too long
        probe = above / f".{secrets.token_hex(8)}.partial"
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be written: {reason}. Fix: choose another place") from None
