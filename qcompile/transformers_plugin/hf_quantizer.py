"""The quantizer that transformers calls while it loads a model: quantizes a float one, or fills a quantized one."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from qcompile.api.quantize import quantize
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.transformers_folder import CONFIG, METHOD, WEIGHTS, set_implementations
from qcompile.modules.kv_constants import CENTERS, PREFIX, SCALES
from qcompile.modules.training_module import TrainingModule
from qcompile.recipe.rule import RecipeError
from qcompile.transformers_plugin.dequantize_model import dequantize_model
from qcompile.transformers_plugin.empty_places import EmptyPlaces
from qcompile.transformers_plugin.qcompile_config import Calibration, QCompileConfig

_ONE_DEVICE = (
    "qcompile quantizes a model on one device. Fix: device_map='cpu' or {'': 0}; a quantized folder can be loaded "
    "with any device_map"
)


class QCompileHfQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """Between `from_pretrained` and qcompile.

    Attributes:
        quantization_config: what was asked for, or what the folder holds.
        pre_quantized: whether the folder holds a quantized model.
    """

    requires_calibration = False  # data, where a recipe needs some, are in the config

    quantization_config: QCompileConfig
    pre_quantized: bool

    def __init__(self, quantization_config: QCompileConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._saved_dtype: torch.dtype | None = None
        self._places: EmptyPlaces | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to quantize a model on several devices.

        Raises:
            RecipeError: the map names several.
        """
        if not self.pre_quantized and isinstance(device_map, dict) and len({str(d) for d in device_map.values()}) > 1:
            raise RecipeError(_ONE_DEVICE)

    def update_device_map(self, device_map: Any) -> Any:
        """A map that names the float model's modules also places the constants of a quantized cache."""
        stored = self.quantization_config.stored
        if not isinstance(device_map, dict) or "" in device_map or stored is None:
            return device_map
        device = next((value for value in device_map.values() if value != "disk"), "cpu")
        return {**{name: device for name in (PREFIX, CENTERS, SCALES) if name in stored.modules}, **device_map}

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the file of tensors, which transformers does not look for by itself, and the implementations that ran.

        Raises:
            CheckpointError: config.json names our method and no quantized model.
        """
        if not self.pre_quantized:
            return config
        stored = self.quantization_config.stored
        if stored is None:  # of a model in training, or written by hand or by an older version
            if getattr(config, WEIGHTS, None) is not None:
                return config  # what it says is what transformers raises
            raise CheckpointError(
                f"{CONFIG} names the method {METHOD} and describes no quantized model. Fix: write the folder by "
                "qcompile.save, or by save_pretrained of the quantized model"
            )
        setattr(config, WEIGHTS, stored.weights)
        self._saved_dtype = _as_dtype(getattr(config, "dtype", None))
        set_implementations(config, stored, only_unset=True)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        stored = self.quantization_config.stored
        if self.pre_quantized and stored is not None:
            dtype = _as_dtype(getattr(model.config, "dtype", None))  # what was asked for, or the saved one
            cast = None if dtype == self._saved_dtype else dtype
            self._places = EmptyPlaces(model, stored, [Path(name) for name in checkpoint_files or ()], cast)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantize, or finish loading.

        Raises:
            ValueError: as of `qcompile.quantize`.
        """
        config = self.quantization_config
        if self._places is not None:
            self._places.finish(model)
            self._places = None
            return model
        if len({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}) > 1:
            raise RecipeError(_ONE_DEVICE)
        c = config.calibration
        report = quantize(model, config.recipe, c.batches, example=c.example, verify=c.verify, progress=c.progress)
        object.__setattr__(model, "qcompile_report", report)
        config.recipe, config.calibration = model.qcompile_recipe, Calibration()
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Asked for by transformers' own writer, which the model's `save_pretrained` stands in front of.

        Raises:
            CheckpointError: it would write a folder that nobody can open.
        """
        adapters = getattr(model, "_hf_peft_config_loaded", False)
        if adapters or any(isinstance(module, TrainingModule) for module in model.modules()):
            return None, {}
        raise CheckpointError(
            "the save_pretrained of transformers' class cannot write a model quantized by qcompile. "
            "Fix: call it on the model, model.save_pretrained(folder), or qcompile.save(model, folder)"
        )

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on top of the model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes the model."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return dequantize_model(model, dtype)


def enter(tables: ModuleType) -> None:
    """Enter our classes in the tables of `transformers.quantizers.auto`."""
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QCompileConfig
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = QCompileHfQuantizer


def _as_dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) else None


enter(auto)
