"""A folder that appears whole or not at all, written by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class CheckpointError(ValueError):
    """A folder that cannot be read or written; the text names the file and the mend."""


def refuse_full(folder: str | Path) -> None:
    """Raise CheckpointError if a folder exists and is not empty: asked before long work."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty: choose another folder or remove it")
    if target.is_dir() and (os.path.ismount(target) or target.resolve() == Path.cwd()):
        raise CheckpointError(f"{target} cannot be replaced as a whole while it is in use: name a folder inside it")


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block ends well, and vanishes otherwise.

    One process at a time may write a folder: the lock goes with the process, however that ends. A process that
    is killed leaves its sibling (`.FOLDER.` and some letters), never half a folder.

    Raises:
        CheckpointError: the folder exists and is not empty, or another process writes it (both before any work), or
            something came to lie there meanwhile (which then stays).
    """
    refuse_full(folder)
    target = Path(folder).resolve()  # the folder that a link names, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    guard = FileLock(target.parent / f".{target.name}.lock")
    try:
        guard.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"{target} is being written by another run: wait for it, or choose another") from None
    work: Path | None = None
    try:
        refuse_full(target)  # another run may have ended meanwhile
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield work
        try:
            if target.exists():
                target.rmdir()
            os.replace(work, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise CheckpointError(
                f"{target} is not empty any more: something was written there meanwhile, and stays. "
                "Run again with another folder"
            ) from error
        target.chmod(0o755)
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # some systems do not delete what is open
            Path(guard.lock_file).unlink(missing_ok=True)
        guard.release()
