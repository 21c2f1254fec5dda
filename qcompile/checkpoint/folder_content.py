"""The content of a folder that holds a model: the one writer behind `save` and `save_pretrained`.

Everything that cannot be stored is refused when it is collected, before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_meta import FolderMeta
from qcompile.checkpoint.model_state import ModelState
from qcompile.checkpoint.tensor_file import DEFAULT_SHARD, OWN_STEM, PLAIN_STEM, digests, size_in_bytes, write_tensors
from qcompile.checkpoint.transformers_folder import implementations, write_files
from qcompile.modules.training_module import refuse_training
from qcompile.modules.wrappers import unwrapped


@dataclass(frozen=True)
class FolderContent:
    """What is written of a model.

    Attributes:
        model: the model, without wrappers.
        recipe: plain data of its recipe; None of a float model.
        state: its tensors.
        shard: the largest size of one file, in bytes.
    """

    model: nn.Module
    recipe: dict[str, Any] | None
    state: ModelState
    shard: int

    @staticmethod
    def of(model: nn.Module, max_shard_size: int | str = DEFAULT_SHARD) -> FolderContent:
        """Collect it.

        Args:
            model: the model; one behind torch.compile or data parallelism is taken without them.
            max_shard_size: the largest size of one file, in bytes or as "5GB".

        Raises:
            CheckpointError: the model is in training, or has something that no checkpoint can store.
        """
        inner = unwrapped(model)
        try:
            refuse_training(inner, "qcompile.save")
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        recipe = getattr(model, "qcompile_recipe", None)
        return FolderContent(inner, recipe, ModelState.of(inner), size_in_bytes(max_shard_size))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.state.tensors.values())

    @property
    def is_plain(self) -> bool:
        """Whether transformers reads the folder as it is: of a float model whose ties it knows."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        known = {*tied, *tied.values(), *self.state.computed}
        return self.recipe is None and not self.state.modules and self.state.shared.keys() <= known

    def write(self, work: Path, tokenizer: Any = None) -> None:
        """Write everything.

        Args:
            work: an empty folder.
            tokenizer: of transformers; None for none.
        """
        plain = self.is_plain
        # The files have names and a format that transformers looks for only where it reads what was saved.
        stem = OWN_STEM if not plain and hasattr(getattr(self.model, "config", None), "save_pretrained") else PLAIN_STEM
        metadata = {"format": "pt" if plain else "qcompile"}
        meta = FolderMeta(
            self.recipe,
            type(self.model).__name__,
            self.state.shared,
            self.state.modules,
            frozenset(self.state.computed),
            self.state.scalars,
            implementations(self.model),
            digests(self.state.tensors),
            weights=write_tensors(self.state.tensors, work, stem, self.shard, metadata),
        )
        files = write_files(self.model, tokenizer, work, mark=not plain, stored=meta.to_json())
        replace(meta, files=files).write(work)
