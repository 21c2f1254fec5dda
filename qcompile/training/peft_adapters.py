"""QA-LoRA through PEFT: a config for `get_peft_model`, and adapters read back from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qcompile.api.model_wrappers import inner_model
from qcompile.modules.quant_linear import QuantLinear
from qcompile.recipe.rule import RecipeError
from qcompile.training.adapters import adapted_names

if TYPE_CHECKING:
    from peft import PeftModel

    from qcompile.training.peft_layer import QALoraConfig


def peft_config(
    model: nn.Module, rank: int = 16, alpha: int = 32, *, example: Any = None, **fields: Any
) -> QALoraConfig:
    """The config with which `peft.get_peft_model` gives a quantized model QA-LoRA adapters.

    Args:
        model: quantized by `qcompile.quantize` in a format with groups.
        rank: of the adapters.
        alpha: an adapter's output is scaled by alpha / rank.
        example: what to find the products with; transformers' models bring their own.
        fields: further fields of peft.LoraConfig, as task_type or lora_dropout. Without target_modules every product
            that can have an adapter gets one, but those that give the output.

    Returns:
        A peft.LoraConfig.

    Raises:
        ValueError: as `qcompile.qa_lora`.
    """
    from qcompile.training.peft_layer import QALoraConfig

    if "target_modules" not in fields:
        fields["target_modules"] = adapted_names(inner_model(model), rank, alpha, example)
    return QALoraConfig(r=rank, lora_alpha=alpha, **fields)


def load_adapter(model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """A quantized model with adapters that `save_pretrained` wrote.

    Adapters that PEFT trained beside GPTQ weights (use_qalora) are read too, with PEFT's scale; their group size must
    be that of the model.

    Args:
        model: quantized as the one that the adapters were trained on; the result wraps it.
        folder: with adapter_config.json.
        is_trainable: whether the adapters shall be trained on.

    Returns:
        A peft.PeftModel.

    Raises:
        RecipeError: the folder holds no LoRA adapter, or one of another kind or group size.
    """
    from peft import LoraConfig, PeftModel

    from qcompile.training.peft_layer import QALoraConfig

    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise RecipeError(f"{path} does not exist. Fix: give the folder that save_pretrained wrote")
    stored = json.loads(path.read_text())
    pooling = stored.pop("qalora_pooling", None)
    if pooling is None and not stored.get("use_qalora"):
        raise RecipeError(
            f"{folder} holds a plain LoRA adapter, which reads single channels and cannot be merged into zero points. "
            "Fix: peft.PeftModel.from_pretrained on the float model, or train one with qcompile.peft_config"
        )
    if pooling is None:
        _check_group(model, int(stored["qalora_group_size"]), str(folder))
    config = QALoraConfig(
        **{name: stored[name] for name in LoraConfig.__dataclass_fields__ if name in stored and name != "use_qalora"},
        qalora_pooling=pooling or "peft",
    )
    config.inference_mode = not is_trainable
    return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)


def _check_group(model: nn.Module, group: int, folder: str) -> None:
    sizes = {m.format.group for m in model.modules() if isinstance(m, QuantLinear) and m.format.per == "group"}
    if sizes != {group}:
        raise RecipeError(
            f"{folder} pools groups of {group}, and the model has groups of {sorted(sizes)}. "
            f"Fix: quantize it in groups of {group}"
        )
