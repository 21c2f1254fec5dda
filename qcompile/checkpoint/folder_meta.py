"""qcompile.json: what a checkpoint says of itself beside its tensors.

schema, qcompile   stamp of the writer
recipe             the recipe, or null of a float model
class              of the model
shared             name of a tied tensor -> the name that has it
modules            path -> entry of a module that the float model does not have (module_entries.py)
computed           tensors that no state_dict has: buffers that are not persistent, and attributes
scalars            path of a module that has such tensors -> its attributes that are plain values
implementations    which of transformers' implementations of attention and experts ran
weights            the file with the tensors, or the index of several files; model.safetensors if it is not named
tensors            name -> digest (tensor_file.py)
files              name of another file of the folder -> digest of its content
digest             of all the above but the stamp

A folder that was written without digests (and then without the keys after "modules") is read without checking them.

In the folder of a model of transformers, config.json has the same data as its `quantization_config`, without "files":
what transformers_plugin/ opens the folder by, which a hub gives it alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.module_entries import Entry
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.schema import SCHEMA, UnknownSchema, needs_upgrade, stamp, upgrade
from qcompile.recipe.strict_json import DamagedJson, read_json

META = "qcompile.json"
_FIX = "Fix: save the model again, or restore the file from a copy"
_WEIGHTS = re.compile(r"[\w-]+\.safetensors(\.index\.json)?")

Scalars = Mapping[str, bool | int | float]


@dataclass(frozen=True)
class FolderMeta:
    """The content of qcompile.json; see the header of this file.

    Attributes:
        recipe: plain data of the present schema; None for a float model.
        model_class: the class of the model.
        shared: name of a tied tensor -> the name that has it.
        modules: path -> entry of a module.
        computed: names of tensors that no state_dict has.
        scalars: path of a module -> its plain values.
        implementations: path of a config -> name of an attribute -> its value.
        tensors: name -> digest; None of a folder that was written without.
        files: name of a file -> digest of its content.
        weights: the file with the tensors, or the index of several files.
    """

    recipe: dict[str, Any] | None
    model_class: str
    shared: Mapping[str, str]
    modules: Mapping[str, Entry]
    computed: frozenset[str] = frozenset()
    scalars: Mapping[str, Scalars] = field(default_factory=dict)
    implementations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tensors: Mapping[str, str] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    weights: str = "model.safetensors"

    def to_json(self) -> dict[str, Any]:
        """Plain data, with its digest."""
        data = {
            **stamp(),
            "recipe": self.recipe,
            "class": self.model_class,
            "shared": dict(self.shared),
            "modules": dict(self.modules),
            "computed": sorted(self.computed),
            "scalars": dict(self.scalars),
            "implementations": dict(self.implementations),
            "weights": self.weights,
            "tensors": self.tensors,
            "files": dict(self.files),
        }
        return {**data, "digest": _digest_of(data)}

    def write(self, root: Path) -> None:
        """Write qcompile.json into a folder whose other files are there."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        (root / META).write_text(text + "\n", encoding="utf-8")

    def parsed_recipe(self) -> Recipe | None:
        """The recipe; None of a float model.

        Raises:
            CheckpointError: it is no recipe.
        """
        if self.recipe is None:
            return None
        try:
            return Recipe.from_json(self.recipe)
        except Exception as error:  # plain data of any shape: whatever reading it meets
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(f"the recipe in {META} cannot be read ({reason}). {_FIX}") from error

    def check_file(self, path: Path) -> None:
        """Check that a file of the folder has the content that was written, where its digest is known.

        Raises:
            CheckpointError: it has not, or cannot be read.
        """
        found, expected = content_digest(_read(path)), self.files.get(path.name)
        if expected is not None and found != expected:
            raise CheckpointError(
                f"{path} was changed: it is not what was saved. Fix: restore it, or pass the float model, "
                "load(folder, model)"
            )


def content_digest(data: Any) -> str:
    """The digest of plain data, whatever the order of keys and the white space of its file."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(data: Mapping[str, Any]) -> str:
    left_out = (*stamp(), "digest", "quant_method")
    return content_digest({key: value for key, value in data.items() if key not in left_out})


def read_meta(root: Path) -> FolderMeta:
    """Read qcompile.json.

    Raises:
        CheckpointError: it is damaged, changed, or of an unknown schema.
    """
    return parse_meta(_read(root / META), root / META, root)


def parse_meta(data: Any, path: Path, source: Path) -> FolderMeta:
    """What `FolderMeta.to_json` gave, checked.

    Args:
        data: plain data.
        path: the file that it is from, for messages.
        source: the folder, for messages.

    Raises:
        CheckpointError: it is damaged, changed, or of an unknown schema.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not of a checkpoint. Fix: name a folder that qcompile.save wrote")
    if data.get("schema") not in (1, SCHEMA):
        _upgraded(source, path, data)
    missing = [key for key in ("recipe", "class", "shared", "modules") if key not in data]
    if missing:
        raise CheckpointError(f"{path} is damaged: it has no {', '.join(missing)}. {_FIX}")
    _check_types(path, data)
    _check_digest(path, data)
    return FolderMeta(
        _upgraded(source, path, data),
        data["class"],
        data["shared"],
        data["modules"],
        frozenset(data.get("computed", ())),
        data.get("scalars", {}),
        data.get("implementations", {}),
        data.get("tensors"),
        data.get("files", {}),
        data.get("weights", "model.safetensors"),
    )


def _upgraded(source: Path, path: Path, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe in the present schema, with a warning where it was of an older one."""
    try:
        recipe: dict[str, Any] | None = data.get("recipe")
        older = needs_upgrade(data, str(source))
        return upgrade(recipe) if older and recipe is not None else recipe
    except UnknownSchema as error:
        raise CheckpointError(str(error)) from None
    except (TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"the recipe in {path} is damaged ({error}). {_FIX}") from error


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except DamagedJson as error:
        raise CheckpointError(f"{error}. {_FIX}") from error


def _check_types(path: Path, data: Mapping[str, Any]) -> None:
    wrong = [key for key, is_right in _TYPES.items() if key in data and not is_right(data[key])]
    if wrong:
        raise CheckpointError(f"{path} is damaged: {', '.join(wrong)} is of a wrong type. {_FIX}")


def _check_digest(path: Path, data: Mapping[str, Any]) -> None:
    newer = [key for key in ("computed", "scalars", "implementations", "weights", "tensors", "files") if key in data]
    if "digest" not in data and not newer:
        return
    if data.get("digest") != _digest_of(data) or "tensors" not in data:
        raise CheckpointError(f"{path} was changed: its content is not what its digest says. {_FIX}")


def _is_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_dicts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def _is_scalars(value: Any) -> bool:
    return _is_dicts(value) and all(
        isinstance(item, int | float) for inner in value.values() for item in inner.values()
    )


_TYPES = {
    "recipe": lambda value: value is None or isinstance(value, dict),
    "class": lambda value: isinstance(value, str),
    "shared": _is_names,
    "modules": _is_dicts,
    "computed": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "scalars": _is_scalars,
    "implementations": lambda value: _is_dicts(value) and all(_is_names(item) for item in value.values()),
    "weights": lambda value: isinstance(value, str) and bool(_WEIGHTS.fullmatch(value)),
    "tensors": _is_names,
    "files": _is_names,
}
