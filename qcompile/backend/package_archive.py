"""A package: one .pt2 file with compiled graphs, one copy of the weights that they read, and our operators.

The archive is torch's (torch.export.pt2_archive): libraries are where AOTIModelPackageLoader looks for them. Ours are

    data/weights/weight_N          the bytes of one tensor, aligned, as they lie in memory: read by mapping the file
    data/qcompile/weights.txt      a line for each weight of each graph:
                                   GRAPH NAME RECORD DTYPE CRC32 D SIZE*D STRIDE*D
    data/qcompile/description     what the package is, and what it needs of a machine
    data/qcompile/operators.so     our operators: a process without Python loads it with dlopen
    data/qcompile/files/*          configs and the tokenizer
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.backend.ahead_of_time import CompiledGraph, open_graph
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.codegen.cpu.native_kernels import load_native_library, native_library, operators_digest
from qcompile.memory.atomic_file import whole_file
from qcompile.memory.fingerprint import fingerprint
from qcompile.version import VERSION

_LIBRARIES, _WEIGHTS = "data/aotinductor/", "data/weights/"  # as torch.export.pt2_archive.constants has them
_OURS = "data/qcompile/"
_FILES = f"{_OURS}files/"
_FORMAT = 1
_BY_HAND = {"aes", "amx_bf16", "amx_fp16", "amx_int8", "amx_tile", "clflush", "clflushopt", "clwb", "sha", "sse4a"}
"""Instructions that a compiler does not choose itself, and that our text does not call, or, as those of AMX, only where
it finds them when it is loaded: a package made with them runs without."""
_AGAIN = "Fix: package the model again, here: qcompile.package(model, path)"


def write_archive(
    path: Path, graphs: Mapping[str, CompiledGraph], files: Mapping[str, bytes], description: Mapping[str, Any]
) -> int:
    """Write a package, whole or not at all.

    Args:
        path: of the file.
        graphs: by name; weights of the same content are written once.
        files: by name: configs and the tokenizer.
        description: plain data of the reader's; what the package needs of a machine is added.

    Returns:
        Its size in bytes.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    """
    from torch.export.pt2_archive import PT2ArchiveWriter  # imports triton

    needs = {"format": _FORMAT, "qcompile": VERSION, **_machine(), "operators": operators_digest()}
    with whole_file(path) as work, PT2ArchiveWriter(str(work)) as archive:
        for name, graph in graphs.items():
            for file in graph.files:
                archive.write_file(f"{_LIBRARIES}{name}/{file.name}", str(file))
        archive.write_string(f"{_OURS}weights.txt", _write_weights(archive, graphs))
        archive.write_string(f"{_OURS}description", json.dumps({**needs, **description}, indent=1))
        archive.write_bytes(f"{_OURS}operators.so", native_library())
        for name, content in files.items():
            archive.write_bytes(f"{_FILES}{name}", content)
    return path.stat().st_size


def _write_weights(archive: Any, graphs: Mapping[str, CompiledGraph]) -> str:
    """Write each different weight once; returns the lines that say which graph reads which."""
    lines, written = list[str](), dict[str, tuple[str, int]]()
    for name, graph in graphs.items():
        for key, weight in graph.weights.items():
            stored = weight.detach().as_strided((weight.numel(),), (1,))  # as it lies in memory
            content = fingerprint(stored)
            if content not in written:
                data = stored.view(torch.uint8).numpy().tobytes() if weight.numel() else b""
                written[content] = f"weight_{len(written)}", zlib.crc32(data)
                archive.write_bytes(f"{_WEIGHTS}{written[content][0]}", data)
            record, check = written[content]
            sizes = " ".join(map(str, (weight.ndim, *weight.shape, *weight.stride())))
            lines.append(f"{name} {key} {record} {str(weight.dtype).removeprefix('torch.')} {check} {sizes}\n")
    return "".join(lines)


class PackageFile:
    """A package that was opened.

    Attributes:
        path: of the file.
        description: what it is, as `write_archive` was given it, with what it needs of a machine.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a package; nothing of it runs yet.

        Raises:
            CheckpointError: it is no package of ours, it is damaged, or it was made for another machine or torch.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"there is no file {path}. Fix: check the path, or write it with qcompile.package")
        try:
            from torch.export.pt2_archive import PT2ArchiveReader

            self._archive = PT2ArchiveReader(str(self.path))
            self.description: dict[str, Any] = json.loads(self._archive.read_bytes(f"{_OURS}description"))
        except Exception as error:  # torch's reader raises RuntimeError and AssertionError of many texts
            raise CheckpointError(
                f"{path} is no package of qcompile, or it is damaged ({_first_line(error)}). "
                "Fix: write it with qcompile.package(model, path)"
            ) from error
        self._check_machine()

    def files(self) -> dict[str, bytes]:
        """Configs and the tokenizer, by name."""
        names = [name for name in self._archive.get_file_names() if name.startswith(_FILES)]
        return {name.removeprefix(_FILES): self._archive.read_bytes(name) for name in names}

    def open_graphs(self) -> dict[str, Callable[[list[Tensor]], list[Tensor]]]:
        """Load the operators and the libraries: code of whoever made the package.

        Returns:
            Name -> function of a graph's inputs. Weights are mapped from the file, not copied.

        Raises:
            CheckpointError: the file is damaged, or the operators that this process runs are not the package's.
        """
        try:
            load_native_library(self._archive.read_bytes(f"{_OURS}operators.so"))
            weights = self._weights()
            return {name: open_graph(str(self.path), name, read) for name, read in weights.items()}
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be loaded ({_first_line(error)}). {_AGAIN}") from error

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        size = os.path.getsize(self.path)
        mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        reader: Any = self._archive.archive_file
        found, records = dict[str, dict[str, Tensor]](), dict[str, Tensor]()
        for line in self._archive.read_string(f"{_OURS}weights.txt").splitlines():
            graph, key, record, kind, check, ndim, *rest = line.split()
            dtype, d = getattr(torch, kind), int(ndim)
            sizes, strides = [int(n) for n in rest[:d]], [int(n) for n in rest[d:]]
            if record not in records:
                start = reader.get_record_offset(f"{_WEIGHTS}{record}")
                records[record] = mapped[start : start + reader.get_record_size(f"{_WEIGHTS}{record}")]
                if zlib.crc32(records[record].numpy().data) != int(check):
                    raise CheckpointError(f"{self.path} is damaged: {record} was changed. {_AGAIN}")
            found.setdefault(graph, {})[key] = records[record].view(dtype).as_strided(sizes, strides)
        return found

    def _check_machine(self) -> None:
        needs, here = self.description, _machine()
        if needs.get("format") != _FORMAT:
            raise CheckpointError(
                f"{self.path} has format {needs.get('format')}, and this qcompile ({VERSION}) reads {_FORMAT}. {_AGAIN}"
            )
        if needs["torch"] != here["torch"]:
            raise CheckpointError(
                f"{self.path} was made with torch {needs['torch']}, and this is {here['torch']}: compiled code fits "
                f"one version. {_AGAIN}, or install torch {needs['torch']}"
            )
        if (needs["system"], needs["processor"]) != (here["system"], here["processor"]):
            raise CheckpointError(
                f"{self.path} was made for {needs['system']} on {needs['processor']}, and this is {here['system']} on "
                f"{here['processor']}. {_AGAIN}"
            )
        missing = sorted(set(needs["instructions"]) - set(here["instructions"]))
        if missing:
            raise CheckpointError(
                f"{self.path} needs instructions that this processor has not: {', '.join(missing)}. {_AGAIN}, or on "
                "the oldest machine that will run it"
            )
        if needs["operators"] != operators_digest():
            raise CheckpointError(
                f"{self.path} was made by qcompile {needs['qcompile']} with other operators than those of this one "
                f"({VERSION}). {_AGAIN}"
            )


def is_package(path: str | Path) -> bool:
    """Whether a path names a package, by how it ends."""
    return str(path).endswith(".pt2")


def _machine() -> dict[str, Any]:
    """What compiled code depends on: torch's version, the system, the processor and its instructions."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "torch": torch.__version__.partition("+")[0],
        "system": platform.system(),
        "processor": platform.machine(),
        "instructions": sorted(name for name, has in capabilities.items() if has is True and name not in _BY_HAND),
    }


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
