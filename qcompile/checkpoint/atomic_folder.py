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
from safetensors import SafetensorError

_PROBE_BYTES = 1 << 16  # more than a file system keeps beside its blocks

# What a system says of a place that it cannot write; other errors inside a block are not about the folder.
_OF_WRITING = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR ENAMETOOLONG ELOOP EMLINK ENXIO ESTALE".split()
    if hasattr(errno, name)
}


class CheckpointError(ValueError):
    """A folder that cannot be read or written; the text names the file and the fix."""


class WriteError(CheckpointError, OSError):
    """A folder that the system does not let us write: no permission, no space, no such device."""


def require_empty(folder: str | Path, size: int = 0) -> None:
    """Check that a folder can be written: before long work, whose result would have no place.

    Args:
        folder: the folder.
        size: bytes that will be written, as far as they are known.

    Raises:
        CheckpointError: it exists and is not empty, or is a mount point or the current folder.
        WriteError: it cannot be written, or has no space for `size` bytes.
    """
    with as_write_error(folder):
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target} exists and is not empty. Fix: choose another folder or remove it")
        if target.is_dir() and (os.path.ismount(target) or target.resolve() == Path.cwd()):
            raise CheckpointError(f"{target} is in use and cannot be replaced as a whole. Fix: name a folder inside it")
        _try_to_write(_resolved(target), size)


@contextmanager
def atomic_folder(folder: str | Path, size: int = 0) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block ends well, and vanishes otherwise.

    One process at a time may write a folder: the lock goes with the process, however that ends. A process that
    is killed leaves its sibling (`.FOLDER.` and some letters), never half a folder.

    Args:
        folder: the folder.
        size: bytes that will be written, as far as they are known.

    Raises:
        CheckpointError: the folder exists and is not empty, or another process writes it (both before any work), or
            something was put there meanwhile (which then stays).
        WriteError: it cannot be written, or the disk became full.
    """
    require_empty(folder, size)
    target = _resolved(Path(folder))  # the folder that a link names, not the link
    with as_write_error(folder), _made(target.parent), locked(target, target.parent / f".{target.name}.lock"):
        sibling: Path | None = None
        try:
            require_empty(target)  # another run may have ended meanwhile
            sibling = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            yield sibling
            _rename(sibling, target)
        finally:
            if sibling is not None:
                shutil.rmtree(sibling, ignore_errors=True)


@contextmanager
def locked(target: Path, file: Path) -> Iterator[None]:
    """Let one process at a time write a folder.

    Args:
        target: the folder, for the message.
        file: of the lock; it is removed at the end.

    Raises:
        CheckpointError: another process writes it.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{target} is being written by another run. Fix: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # some systems do not delete open files
            file.unlink(missing_ok=True)
        lock.release()


def _rename(sibling: Path, target: Path) -> None:
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


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # what Python 3.11 raises for links in a circle
        raise CheckpointError(f"{path} is a link that leads to itself. Fix: choose another folder") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder and its parents exist; those that were made vanish again when the block fails."""
    new = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        new.append(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # not made, or something lies there by now
                path.rmdir()
        raise


def _try_to_write(target: Path, size: int) -> None:
    """Make and remove a file where the folder will be; permissions alone do not say what a file system allows."""
    place = next(path for path in target.parents if path.exists())
    if not place.is_dir():
        raise CheckpointError(f"{target} cannot be made: {place} is a file. Fix: choose another folder")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=place) as probe:
        with open(Path(probe) / "probe", "wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    require_space(target, place, size)


def require_space(target: Path, place: Path, size: int) -> None:
    """Check that the disk of a folder has space.

    Args:
        target: what will be written, for the message.
        place: a folder that exists, on the same disk.
        size: bytes that will be written.

    Raises:
        WriteError: it has not.
    """
    free = shutil.disk_usage(place).free
    if free < size:
        raise WriteError(
            f"{target} needs {size / 1e6:.0f} MB, and {place} has {free / 1e6:.0f} MB free. "
            "Fix: free some space, or choose a folder on another disk"
        )


@contextmanager
def as_write_error(folder: str | Path) -> Iterator[None]:
    """What the system says, as one line that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, WriteError) or (isinstance(error, OSError) and error.errno not in _OF_WRITING):
            raise
        reason = " ".join(str(error).split())
        raise WriteError(
            f"{folder} cannot be written ({reason}); nothing was kept. Fix: free some space there, or choose a folder "
            "that you may write"
        ) from error
