"""A GGUF file whose tensors are read and dequantized when they are needed: each becomes a StoredTensor.

What a converter to GGUF does to a model (other names, another order of rows, constants, stacks of experts) is undone by
transformers' own tables and processors, as when it loads the file whole, but for one parameter at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.memory.spilled_weights import SMALL
from qcompile.memory.stored_tensor import StoredTensor


def reads_in_parts(path: Path) -> bool:
    """Whether the parameters of a GGUF file can be read one at a time.

    Of a few new architectures transformers converts the tensors by itself, and only while it loads all of them.

    Args:
        path: of a file whose header is sound.
    """
    try:
        from transformers.integrations.gguf.reader import read_gguf_metadata
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ModuleNotFoundError:  # a version that reads all architectures in the one way
        return True
    metadata, _ = read_gguf_metadata(str(path))
    return not is_gguf_arch_supported(metadata["general.architecture"])


def stored_gguf(path: Path, model: nn.Module, small: int = SMALL) -> dict[str, Tensor]:
    """The tensors of a GGUF file in float32, by the names of a model.

    Args:
        path: the file; its header is sound.
        model: of transformers, of the file's configuration; its parameters may be on the meta device.
        small: bytes up to which a tensor is read now.

    Returns:
        A StoredTensor for every parameter that is larger. Tensors that the model has no name for are omitted. One
        whose number of values is not the model's has its shape in the file, so that who loads it can tell.

    Raises:
        CheckpointError: the file cannot be read one tensor at a time.
        NotImplementedError: it holds a type that gguf does not dequantize.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as whole

    if not reads_in_parts(path):
        raise CheckpointError(
            f"{path} is of an architecture that transformers reads whole. Fix: load it whole, or save the model by "
            "save_pretrained and give that folder"
        )
    reader = gguf.GGUFReader(str(path))
    for kind, data in {tensor.tensor_type: tensor.data for tensor in reader.tensors}.items():
        gguf.dequantize(data.reshape(-1, data.shape[-1])[:1], kind)  # now, and not when hours of work are done
    architecture = str(reader.fields["general.architecture"].contents())
    config = whole.load_gguf_checkpoint(str(path))["config"]
    processor = whole.TENSOR_PROCESSORS.get(architecture, whole.TensorProcessor)(config=config)
    names: dict[str, str] = whole.get_gguf_hf_weights_map(model, processor)
    parts: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        name = names.get(_name_in_map(tensor.name, processor))
        if name is not None:
            parts.setdefault(name, []).append(tensor)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, tensors in parts.items():
        shape = shapes[name]
        if shape.numel() != sum(int(tensor.n_elements) for tensor in tensors):
            shape = torch.Size(reversed(tensors[0].shape.tolist()))
        like = torch.empty(shape, dtype=torch.float32, device="meta")
        read = functools.partial(_read, path, processor, names, name, tensors, like)
        found[name] = StoredTensor(like, read) if like.nbytes > small else read()
    return found


def _name_in_map(name: str, processor: Any) -> str:
    """What the map of names calls a tensor: stacks of experts are parameters without a suffix."""
    stack = getattr(processor, "GGUF_MOE_WEIGHTS_PATTERN", None)
    if stack is not None and "name" in stack.groupindex and (match := stack.fullmatch(name)):
        return str(match["name"])
    return name


def _read(
    path: Path, processor: Any, names: Mapping[str, str], name: str, tensors: Sequence[Any], like: Tensor
) -> Tensor:
    """One parameter of the model.

    Args:
        path: the file.
        processor: of transformers.
        names: of tensors in the file -> of parameters.
        name: of the parameter.
        tensors: those of the file that it is made of.
        like: its shape.

    Raises:
        CheckpointError: the file is gone, ends before, or makes another shape of it.
    """
    import gguf

    parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
    for tensor in tensors:
        stored = tensor.data  # where it lies; read by itself, pages of a mapping would count as ours
        try:
            raw = np.fromfile(path, stored.dtype, stored.size, offset=int(tensor.data_offset)).reshape(stored.shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read any more ({error}). Fix: restore it, and run again"
            ) from error
        values = gguf.dequantize(raw, tensor.tensor_type)
        done = processor.process(weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed)
        if done.name in names:
            parsed["tensors"][names[done.name]] = torch.from_numpy(done.weights)
    made = parsed["tensors"].get(name)
    if made is None or (made.shape != like.shape and made.numel() == like.numel()):
        form = "nothing" if made is None else list(made.shape)
        raise CheckpointError(f"{path} holds {form} as {name}, the model {list(like.shape)}. Fix: load it whole")
    return made.float().contiguous()
