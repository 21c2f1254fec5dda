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
    """A folder that cannot be read or written; the text names the file and the fix."""


def require_empty(folder: str | Path) -> None:
    """Check that a folder can be written: before long work, whose result would have no place.

    Raises:
        CheckpointError: it exists and is not empty, or is a mount point or the current folder.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty. Fix: choose another folder or remove it")
    if target.is_dir() and (os.path.ismount(target) or target.resolve() == Path.cwd()):
        raise CheckpointError(f"{target} is in use and cannot be replaced as a whole. Fix: name a folder inside it")


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block ends well, and vanishes otherwise.

    One process at a time may write a folder: the lock goes with the process, however that ends. A process that
    is killed leaves its sibling (`.FOLDER.` and some letters), never half a folder.

    Raises:
        CheckpointError: the folder exists and is not empty, or another process writes it (both before any work), or
            something was put there meanwhile (which then stays).
    """
    require_empty(folder)
    target = Path(folder).resolve()  # the folder that a link names, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{target} is being written by another run. Fix: wait for it, or choose another folder"
        ) from None
    sibling: Path | None = None
    try:
        require_empty(target)  # another run may have ended meanwhile
        sibling = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield sibling
        try:
            if target.exists():
                target.rmdir()
            os.replace(sibling, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise CheckpointError(
                f"{target} is not empty any more: something was written there meanwhile, and stays. "
                "Fix: run again with another folder"
            ) from error
        target.chmod(0o755)
    finally:
        if sibling is not None:
            shutil.rmtree(sibling, ignore_errors=True)
        with contextlib.suppress(OSError):  # some systems do not delete open files
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
