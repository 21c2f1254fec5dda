"""What a GGUF file holds, by type: tensors, values and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class StoredType:
    """All tensors of one type.

    Attributes:
        name: of the type, as "Q4_K".
        tensors: how many there are.
        values: how many values they have.
        nbytes: bytes that they take.
    """

    name: str
    tensors: int
    values: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits of one value, with its share of scales."""
        return 8 * self.nbytes / self.values if self.values else 0.0


def stored_types(path: Path) -> list[StoredType]:
    """The types of a file, those with the most bytes first."""
    import gguf

    found: dict[str, list[tuple[int, int]]] = {}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        found.setdefault(tensor.tensor_type.name, []).append((int(tensor.n_elements), int(tensor.n_bytes)))
    rows = [
        StoredType(name, len(each), *(sum(part) for part in zip(*each, strict=True))) for name, each in found.items()
    ]
    return sorted(rows, key=lambda row: -row.nbytes)


def quantized_types(path: Path) -> list[str]:
    """Names of the types of a file that are no floats, those with the most bytes first."""
    return [row.name for row in stored_types(path) if row.name not in _FLOATS]
