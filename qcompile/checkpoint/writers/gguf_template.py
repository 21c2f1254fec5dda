"""A GGUF file of the same model as the template of another: its names, metadata and order of rows.

Converters rename tensors, permute the rows of some and add a constant to others. None of that is rebuilt here: the
template is loaded by transformers, which undoes it, and rows are found by equality with what was loaded.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.checkpoint.gguf_reads import parsed_once
from qcompile.checkpoint.stored_gguf import reads_in_parts, stored_gguf
from qcompile.checkpoint.writers.export_refusals import ExportError, quantized_linears


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model stands in the file.

    Attributes:
        name: of the tensor in the file.
        rows: [N] the row of the model that each row of the file is; None: all in order.
        offset: a constant that the file adds, as to the gains of some norms.
    """

    name: str
    rows: Tensor | None
    offset: float

    def arranged(self, tensor: Tensor) -> Tensor:
        """A tensor of the model with its rows in the order of the file; the constant is not added."""
        return tensor if self.rows is None else tensor[self.rows]


class GgufTemplate:
    """A template that was read.

    Attributes:
        reader: the package's reader of the file.
        architecture: as the file calls it.
        places: name of a parameter of the model -> its place.
        shapes: name of a parameter of the model -> its shape.
        extra: names of tensors that no parameter of the model is, as tables of frequencies.
    """

    def __init__(self, path: Path) -> None:
        """Read it. Raises ExportError if it is no GGUF file, or not one that transformers reads in full."""
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise ExportError(f"{error}. Fix: pip install 'torch-qcompile[gguf]'") from error
        if not path.is_file():
            raise ExportError(f"the template {path} is no file. Fix: give a GGUF file of the same model")
        with parsed_once() as parsed:
            model = _load(path)
            self.reader = parsed(str(path))
        self.architecture = str(self.reader.fields["general.architecture"].contents())
        kind = next((k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        count = self.reader.fields.get(f"{self.architecture}.block_count")
        if kind is None or count is None:
            raise ExportError(f"{path}: the gguf package does not know the architecture {self.architecture!r}")
        self._names = gguf.get_tensor_name_map(kind, int(count.contents()))
        tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.places: dict[str, Place] = {}
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            stored = tensors.get(self.name_of(name))
            if stored is None:
                raise ExportError(
                    f"{name}: the template has no tensor for it ({self.name_of(name) or 'no name is known'}), as of "
                    "stacks of experts. Fix: export to compressed-tensors"
                )
            data = gguf.quants.dequantize(stored.data, stored.tensor_type)
            like = self.places.get(f"{name.removesuffix('.bias')}.weight")
            found = torch.from_numpy(np.array(data)).float()
            self.places[name] = Place(stored.name, *_arrangement(name, found, parameter.detach().float(), like))
        used = {place.name for place in self.places.values()}
        self.extra = [name for name in tensors if name not in used]

    def check(self, model: Any) -> None:
        """Refuse a model of other sizes than the template's, or with fewer layers; it may have more tensors.

        Args:
            model: float or quantized.

        Raises:
            ExportError: with the first tensor that differs.
        """
        ours = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        for path, linear in quantized_linears(model).items():
            ours[f"{path}.weight"] = [linear.out_features, linear.in_features]
            if linear.bias is not None:
                ours[f"{path}.bias"] = [linear.out_features]
        for name, shape in self.shapes.items():
            if ours.get(name) != list(shape):
                raise ExportError(
                    f"{name}: the template holds it as {list(shape)}, the model as {ours.get(name, 'nothing')}: it is "
                    "of another model. Fix: give a GGUF file of the same model"
                )

    def name_of(self, parameter: str) -> str:
        """The name that the file gives a parameter of the model; "" if there is none."""
        return self._names.get_name(parameter, try_suffixes=(".weight", ".bias")) or ""

    def place_of(self, parameter: str, embedding: str) -> Place:
        """The place of a parameter; logits that were tied get one in the order of the embeddings.

        Args:
            parameter: of the model.
            embedding: the name of its embedding table.

        Raises:
            ExportError: the template has none.
        """
        if parameter in self.places:
            return self.places[parameter]
        name = self.name_of(parameter)
        if name != "output.weight" or embedding not in self.places:
            raise ExportError(
                f"{parameter}: the template has no tensor for it. Fix: give a GGUF file of the same model, or quantize "
                "without the pass that added it"
            )
        return Place(name, self.places[embedding].rows, 0.0)


def _load(path: Path) -> Any:
    """The template as a float model of transformers, whose weights stay in the file where it is read in parts."""
    import transformers

    cls, file = transformers.AutoModelForCausalLM, {"gguf_file": path.name}
    try:
        if not reads_in_parts(path):
            return cls.from_pretrained(str(path.parent), dtype=torch.float32, **file)
        config = transformers.AutoConfig.from_pretrained(str(path.parent), **file)
        with torch.device("meta"):
            built = cls.from_config(config)
        return type(built).from_pretrained(
            None, config=config, state_dict=stored_gguf(path, built), dtype=torch.float32
        )
    except Exception as error:  # whatever reading a foreign file runs into
        reason = " ".join(str(error).split())
        raise ExportError(
            f"the template {path} cannot be read by transformers ({type(error).__name__}: {reason:.200}). "
            "Fix: give a GGUF file of the same model"
        ) from error


def _arrangement(name: str, stored: Tensor, ours: Tensor, like: Place | None) -> tuple[Tensor | None, float]:
    """The order of rows and the constant that make a parameter the stored tensor."""
    if torch.equal(stored, ours):
        return None, 0.0
    if stored.shape == ours.shape and stored.ndim == 1:
        offset = float((stored - ours).double().mean().round())
        if torch.allclose(stored, ours + offset, rtol=0, atol=1e-6):
            return None, offset
        if like is not None and like.rows is not None and torch.equal(stored, ours[like.rows]):
            return like.rows, 0.0
    elif stored.shape == ours.shape:
        waiting: dict[bytes, deque[int]] = defaultdict(deque)
        for index, row in enumerate(ours.numpy()):
            waiting[row.tobytes()].append(index)
        found = [waiting[row.tobytes()].popleft() if waiting[row.tobytes()] else -1 for row in stored.numpy()]
        if -1 not in found:
            return torch.tensor(found), 0.0
    raise ExportError(
        f"{name}: the template holds it as {list(stored.shape)}, neither in another order of rows nor with a constant "
        "added. Fix: export to compressed-tensors"
    )
