"""Files of a folder that may exist already, written aside and then moved there, as `save_pretrained` needs it.

A folder that does not exist appears whole (atomic_folder.py). In one that exists, an error while the files are written
leaves everything as it was; then each file is moved by one rename. A process that is killed between two renames leaves
old and new files, which the digests of the checkpoint tell apart.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompile.checkpoint.atomic_folder import CheckpointError, as_write_error, atomic_folder, locked, require_space
from qcompile.checkpoint.tensor_file import OWN_STEM

_LOCK = ".qcompile.lock"
_OWN_WEIGHTS = re.compile(rf"{OWN_STEM}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@contextmanager
def replaced_files(folder: str | Path, size: int = 0) -> Iterator[Path]:
    """A temporary folder whose files are moved into `folder` when the block ends well, and vanish otherwise.

    Weights of qcompile that an earlier save left in the folder and that are not written again are removed; all other
    files stay.

    Args:
        folder: the folder; it is made if it does not exist.
        size: bytes that will be written, as far as they are known.

    Raises:
        CheckpointError: another process writes it, or something that is no file has the name of a file.
        WriteError: it cannot be written, or the disk became full.
    """
    target = Path(folder)
    if not target.exists():
        with atomic_folder(target, size) as sibling:
            yield sibling
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file. Fix: choose another folder")
    with as_write_error(folder):
        require_space(target, target, size)
        with locked(target, target / _LOCK), tempfile.TemporaryDirectory(prefix=".qcompile.", dir=target) as work:
            yield Path(work)
            _move(Path(work), target)


def _move(work: Path, target: Path) -> None:
    names = sorted(os.listdir(work))
    blocked = [name for name in names if (target / name).is_dir()]
    if blocked:
        raise CheckpointError(f"{target / blocked[0]} is a folder. Fix: remove it, or choose another folder")
    for name in names:
        os.replace(work / name, target / name)
    for name in os.listdir(target):
        if _OWN_WEIGHTS.fullmatch(name) and name not in names:
            (target / name).unlink()
