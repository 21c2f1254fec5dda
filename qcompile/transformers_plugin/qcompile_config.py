"""What `from_pretrained(.., quantization_config=..)` is told: how to quantize a float model, or what a folder holds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_meta import FolderMeta, parse_meta
from qcompile.checkpoint.transformers_folder import CONFIG, METHOD
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class Calibration:
    """The arguments of `qcompile.quantize` beside model and recipe; of this process only, never written.

    Attributes:
        batches: calibration data, or None.
        example: what to trace with when there are no batches.
        verify: certify every exact pass.
        progress: show bars.
    """

    batches: Iterable[Any] | None = None
    example: Any = None
    verify: bool = True
    progress: bool = False


class QCompileConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """Quantize a model as it is loaded.

        AutoModelForCausalLM.from_pretrained(name, quantization_config=QCompileConfig("w4a16"))

    Attributes:
        quant_method: "qcompile".
        recipe: what was given; plain data once the model is quantized.
        calibration: the other arguments.
        stored: what a folder says of the quantized model that it holds; None of a model that is to be quantized.
    """

    def __init__(
        self,
        recipe: str | Recipe | dict[str, object] = "int8",
        batches: Iterable[Any] | None = None,
        *,
        example: Any = None,
        verify: bool = True,
        progress: bool = False,
    ) -> None:
        """Arguments are those of `qcompile.quantize`.

        Raises:
            RecipeError: there is no such recipe, or it trains.
        """
        self.quant_method = cast(QuantizationMethod, METHOD)
        self.recipe = recipe
        self.calibration = Calibration(batches, example, verify, progress)
        self.stored: FolderMeta | None = None
        if recipe != "auto" and find_recipe(recipe).trains:
            raise RecipeError(f"recipe {recipe!r} trains. Fix: load the float model, then qcompile.train(model, ..)")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What config.json of a folder says, or plain data with the arguments of this class.

        Raises:
            CheckpointError: it is of another method, damaged, changed, or of an unknown schema.
            RecipeError: there is no such recipe.
        """
        method = config_dict.get("quant_method", METHOD)
        if method != METHOD:
            raise CheckpointError(
                f"this is the quantization_config of {method!r}, not of qcompile. Fix: use that method's config"
            )
        if "modules" in config_dict:
            config = cls("int8")
            config.stored = parse_meta(config_dict, Path(CONFIG), Path(CONFIG))
            config.recipe = config.stored.recipe or {}
        else:
            arguments = {key: value for key, value in config_dict.items() if key != "quant_method"}
            unknown = sorted(arguments.keys() - {"recipe", "verify", "progress"})
            if unknown:
                raise CheckpointError(f"a quantization_config of qcompile has no {unknown[0]!r}. Fix: remove it")
            config = cls(**arguments)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Method and recipe, as JSON can say them. What else a folder needs is written by `save_pretrained`."""
        recipe = self.recipe.to_json() if isinstance(self.recipe, Recipe) else self.recipe
        return {"quant_method": METHOD, "recipe": copy.deepcopy(recipe)}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> QCompileConfig:
        """A copy with the same calibration data: transformers copies configs, and data may be read only once."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other
