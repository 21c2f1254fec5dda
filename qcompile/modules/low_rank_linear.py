"""LowRankLinear: a quantized linear that is trained through a low-rank parameter, which is zero between the steps.

An optimizer sees `low` [N, r] (or [r, K]) in place of the weight. What it adds to the zeros is folded into the codes
behind its step:

    W <- SR( dq(W) (1 - decay) + sigma L P ),  L <- 0

which is the optimizer's step in the basis P, as GaLore does it (see ir/low_rank_ops.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.low_rank_ops import check_folded
from qcompile.ir.projected_gradient_op import DUE, GAP, STEP, stored_basis
from qcompile.modules.dequantized_weight import read_only
from qcompile.modules.quant_linear import QuantLinear, result_dtype
from qcompile.modules.training_module import TrainingModule
from qcompile.numerics.code_rounding import changed_codes
from qcompile.numerics.counter_random import derived_stream
from qcompile.numerics.format import Format
from qcompile.numerics.low_rank import expand, is_left
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.whole_tensor import gathered, is_finite, is_sharded, is_zero

STATE = ("codes", "scale", "zero", "basis", "basis_scale", "basis_zero", "first", "similarities", "schedule")
"""The buffers: the weight's codes (or the float weight), and the basis with its schedule."""


@dataclass(frozen=True)
class LowRankRule:
    """How a weight is trained.

    Attributes:
        format: of the weight; None keeps it float.
        basis_format: of the basis; None keeps it float.
        scale: sigma, of the step.
        threshold: mean |cos| of the last bases from which on the interval grows.
        factor: what the interval is multiplied by.
        stochastic: whether the weight is rounded stochastically.
        stream: of the random values of this weight.
    """

    format: Format | None
    basis_format: Format | None
    scale: float
    threshold: float
    factor: int
    stochastic: bool
    stream: int


class LowRankLinear(TrainingModule):
    """x -> x dq(W)^T + bias, where W is trained through `low`.

    Attributes:
        in_features: K.
        out_features: N.
        rule: how it is trained.
        codes: stored codes of [N, K], or the float weight.
        scale: as in QTensor, or None.
        zero: its zero point, or None.
        basis: stored codes of P [r, K] (or [r, N] where N < K), or floats.
        basis_scale: as in QTensor, or None.
        basis_zero: its zero point, or None.
        first: the first vector of the last basis.
        similarities: of the last bases.
        schedule: int64 [4], see ir/projected_gradient_op.py.
        low: L, zeros. No state_dict has it.
        bias: [N] or None.
    """

    FIXED_DTYPE = STATE

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    basis: Tensor
    basis_scale: Tensor | None
    basis_zero: Tensor | None
    first: Tensor
    similarities: Tensor
    schedule: Tensor
    low: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, tensors: dict[str, Tensor | None], low: Tensor, bias: nn.Parameter | None, rule: LowRankRule):
        """Build from tensors by the names of STATE, and zeros of the shape and dtype of `low`."""
        super().__init__()
        codes, first = tensors["codes"], tensors["first"]
        assert codes is not None and first is not None
        self.out_features = codes.shape[0]
        self.in_features = codes.shape[1]
        self.rule = rule
        for name in STATE:
            self.register_buffer(name, tensors.get(name))
        self.low = nn.Parameter(torch.zeros_like(low))
        self.register_parameter("bias", bias)
        _LIVE.add(self)

    @property
    def left(self) -> bool:
        """Whether the basis multiplies from the left."""
        return is_left(self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, [N, K]; computed at each access, it refuses to be written."""
        return read_only(self._weight())

    def forward(self, input: Tensor) -> Tensor:
        """x [.., K] -> [.., N]; the argument has the name that nn.Linear gives it."""
        rule, dtype = self.rule, result_dtype(input)
        out: Tensor = torch.ops.qcompile.low_rank_linear(
            input.to(dtype),
            self.codes,
            self.scale,
            self.zero,
            self.low,
            self.bias,
            self.basis,
            self.basis_scale,
            self.basis_zero,
            self.first,
            self.similarities,
            self.schedule,
            format_text(rule.format),
            format_text(rule.basis_format),
            rule.threshold,
            rule.factor,
            dtype,
        )
        return out

    @torch.no_grad()
    def fold(self, decay: float = 0.0, step: Tensor | None = None) -> None:
        """Put an optimizer's step into the weight.

        Args:
            decay: learning rate times decoupled weight decay.
            step: what the optimizer adds to L; None: it was added already, and L becomes zero.

        Raises:
            ValueError: the step holds NaN or Inf; the weight is then as it was, and L zero.
        """
        change = gathered(self.low if step is None else step)
        finite = is_finite(change)
        dtype = self.first.dtype  # at least float32
        values = expand(change.to(dtype), self._basis().to(dtype), self.left).mul_(self.rule.scale)
        if step is None:
            self.low.zero_()
        if not finite:
            raise ValueError(
                f"the optimizer's step for a weight [{self.out_features}, {self.in_features}] holds NaN or Inf: its "
                "gradient did. Fix: torch.amp.GradScaler with float16; or a lower learning rate, and start again from "
                "a checkpoint"
            )
        if self.rule.format is None:
            self.codes.mul_(1.0 - decay).add_(values)
        else:
            parts = self._quantized(self.rule.format)
            draw = derived_stream(self.rule.stream, self.schedule[STEP]) if self.rule.stochastic else None
            new = changed_codes(parts, values, decay, draw)
            for mine, part in ((self.codes, new.codes), (self.scale, new.scale), (self.zero, new.zero)):
                if mine is not None and part is not None:
                    mine.copy_(part)
        self.schedule[STEP] += 1
        if int(self.schedule[STEP]) % int(self.schedule[GAP]) == 0:
            self.schedule[DUE] = 1

    def free_low(self) -> None:
        """Keep one zero in memory for all of L, for an optimizer that never writes to it."""
        if any(self.low.stride()):
            self.low.data = self.low.data.new_zeros(()).expand(self.low.shape)

    def hold_low(self) -> None:
        """Give L memory of its own, for an optimizer that writes to it; a shard has it, and FSDP knows it."""
        if is_sharded(self.low):
            return
        self.low.data = torch.zeros_like(self.low.data, memory_format=torch.contiguous_format)

    def settled(self) -> nn.Module:
        """The linear for inference, quantized as the weight is."""
        check_folded(self.low)
        bias = None if self.bias is None else self.bias.detach()
        if self.rule.format is not None:
            tensors = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "bias": bias}
            return QuantLinear(self.in_features, self.out_features, self.rule.format, None, tensors)
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(self.codes, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        """As nn.Linear's, with the formats."""
        rank, formats = self.basis.shape[0], (self.rule.format or "float", self.rule.basis_format or "float")
        return f"{self.in_features}, {self.out_features}, rank={rank}, weight={formats[0]}, basis={formats[1]}"

    def _quantized(self, format: Format) -> QTensor:
        assert self.scale is not None
        return QTensor.from_stored((self.codes, self.scale, self.zero, None), format, self.in_features)

    def _weight(self) -> Tensor:
        return self.codes if self.rule.format is None else self._quantized(self.rule.format).dequantize()

    def _basis(self) -> Tensor:
        form = format_text(self.rule.basis_format)
        return stored_basis(self.basis, self.basis_scale, self.basis_zero, form, self.first.shape[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of any module; but L keeps its dtype, in which an optimizer has its moments."""
        dtype = self.low.dtype
        result = super()._apply(fn, recurse)
        if self.low.dtype != dtype:
            self.low.data = self.low.data.to(dtype)
            if self.low.grad is not None:
                self.low.grad = self.low.grad.to(dtype)
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        check_folded(self.low)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}low"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if f"{prefix}low" in missing_keys:
            missing_keys.remove(f"{prefix}low")
        with torch.no_grad():
            if not is_zero(self.low):
                self.low.zero_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _LIVE.add(self)


_LIVE: weakref.WeakSet[LowRankLinear] = weakref.WeakSet()
"""All of them, to find the one of a parameter: an attribute of a tensor would be lost by copies and casts."""


def modules_of(parameters: Iterable[Tensor]) -> dict[int, LowRankLinear]:
    """id of a parameter -> the module whose `low` it is, for those that are one."""
    ids = {id(parameter) for parameter in parameters}
    return {id(module.low): module for module in list(_LIVE) if id(module.low) in ids}


def format_text(format: Format | None) -> str:
    """A format as operators take it; "" for floats."""
    return "" if format is None else str(format)
