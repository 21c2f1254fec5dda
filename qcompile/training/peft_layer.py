"""QA-LoRA as a layer of PEFT, for `QuantLinear`: what `get_peft_model` puts beside a quantized product.

Importing this file imports PEFT. Three scales of a group-pooled adapter are in use: the authors' code (and ours) takes
mean * c, PEFT's own layers for GPTQ weights take mean * (K / G) * c (peft 0.21, tuners/lora/variants.py); adapters that
were saved without `qalora_pooling` are read as PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qcompile.modules.adapted_linear import merged
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.zero_shift import shift_obstacle
from qcompile.recipe.rule import RecipeError

_UNSUPPORTED = ("use_dora", "lora_bias", "alora_invocation_tokens", "megatron_config", "loftq_config")


@dataclass
class QALoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig whose layers are QALoraLayer.

    Attributes:
        qalora_pooling: "mean" (the authors' scale and ours) or "peft" (mean * K / G).
    """

    qalora_pooling: str = field(default="mean", metadata={"help": "scale of the pooled input: mean, or peft's"})

    def __post_init__(self) -> None:
        super().__post_init__()
        used = [name for name in _UNSUPPORTED if getattr(self, name, None)]
        if used:
            raise RecipeError(f"QA-LoRA: {', '.join(used)} cannot be merged into zero points. Fix: leave it out")
        if self.qalora_pooling not in ("mean", "peft"):
            raise RecipeError(f"qalora_pooling is {self.qalora_pooling!r}. Fix: 'mean' or 'peft'")
        self._register_custom_module({QuantLinear: QALoraLayer})


class QALoraLayer(nn.Module, LoraLayer):  # type: ignore[misc]
    """base(x) + scaling * pool(x) A^T B^T, for every active adapter.

    Merging moves the zero points of the base, exactly; unmerging puts the base back that was there before.
    """

    SETTLED_BY = "model.merge_and_unload()"

    base_layer: Any  # these come from LoraLayer, which mypy does not see
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: Any
    disable_adapters: Any
    active_adapters: Any
    merged: Any
    merged_adapters: Any
    get_base_layer: Any

    def __init__(
        self, base_layer: QuantLinear, adapter_name: str, config: QALoraConfig, r: int = 0, lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        obstacle = shift_obstacle(base_layer.format)
        if obstacle is not None:
            raise RecipeError(
                f"QA-LoRA: {kwargs.get('target_name', 'a module')}: {obstacle}. "
                "Fix: qcompile.peft_config(model), which takes the modules that can have an adapter"
            )
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.path = kwargs.get("target_name") or "a module"
        self.group = base_layer.format.width(base_layer.in_features)
        self._before_merges: list[QuantLinear] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: QuantLinear) -> tuple[int, int]:
        """Columns of A, a group each, and rows of B."""
        return module.format.groups(module.in_features), module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: QALoraConfig, **kwargs: Any) -> None:
        """Add an adapter (PEFT calls it for the second one too)."""
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if config.qalora_pooling == "peft":
            self.scaling[adapter_name] *= self.in_features

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """A drawn Xavier uniform, as the authors do, and B zero."""
        LoraLayer.reset_lora_parameters(self, adapter_name, init_lora_weights)
        if init_lora_weights is True:
            nn.init.xavier_uniform_(self.lora_A[adapter_name].weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT asks the weight, which is dequantized at each access; adapters are float32 where the codes are."""
        base: Any = self.get_base_layer()
        place = device or base.codes.device
        for adapters in (self.lora_A, self.lora_B):
            adapters[adapter_name].to(place)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [.., K] -> [.., N]."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "QA-LoRA: adapter_names gives each row of a batch an adapter of its own, and all rows have the same "
                "here. Fix: model.set_adapter(name), one batch for each"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        out: Tensor = self.base_layer(input)
        if self.disable_adapters or self.merged:
            return out
        for name in self.active_adapters:
            if name in self.lora_A:
                x = self.lora_dropout[name](self.base_layer.operand(input))
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                added = torch.ops.qcompile.group_adapter(x, a, b, self.group, self.scaling[name])
                out = out + added.to(out.dtype)
        return out

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the zero points.

        Args:
            safe_merge: refuse an adapter with NaN or Inf.
            adapter_names: default: the active ones that are not merged yet.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            product = self.lora_B[name].weight.double() @ self.lora_A[name].weight.double()
            if safe_merge and not torch.isfinite(product).all():
                raise ValueError(f"adapter {name!r} has NaN or Inf. Fix: load another checkpoint of it")
            try:
                into = merged(self.base_layer, product, self.scaling[name])
            except ValueError as error:
                raise ValueError(f"{self.path}, adapter {name!r}: {error}") from error
            self._before_merges.append(self.base_layer)
            self.base_layer = into
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base back that was there before, bit for bit."""
        if self._before_merges:
            self.base_layer = self._before_merges[0]
        self._before_merges.clear()
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: the adapter of a group is no low-rank matrix of the channels that PEFT could convert."""
        return False
