"""Optimizers for Q-GaLore: any one, whose steps are folded into the weights, and AdamW with moments in 8 bits.

    optimizer = qcompile.optim.fold_after(torch.optim.AdamW(model.parameters(), lr=0.01))
    optimizer = qcompile.optim.QGaLoreAdamW8bit(model.parameters(), lr=0.01)

Both are made after `qcompile.train(model, "q-galore")`: the parameters that they train are not those of the float
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcompile.modules.low_rank_linear import LowRankLinear, modules_of
from qcompile.numerics.dynamic_map import from_codes, to_codes
from qcompile.numerics.whole_tensor import is_finite, is_sharded, is_zero

_SMALL = 4096  # a smaller parameter keeps float32 moments: norms and biases

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741


def fold_after(optimizer: O) -> O:
    """Fold what an optimizer adds to the low-rank parameters into the weights, behind each of its steps.

    The weights decay by the learning rate times `weight_decay` of their parameter group, decoupled, whatever the
    optimizer does with it: the low-rank parameters are zero, so its own decay of them does nothing.

    Args:
        optimizer: of torch, bitsandbytes, torchao, ..., made from parameters of a model in Q-GaLore training. One that
            LRScheduler, GradScaler or accelerate then wraps still folds. Parameters may be sharded by fully_shard:
            every process then folds the whole step.

    Returns:
        The optimizer.

    Raises:
        ValueError: none of its parameters is a low-rank one of a model in training; it folds already.
    """
    if isinstance(optimizer, QGaLoreAdamW8bit) or any(
        h is _fold for h in optimizer._optimizer_step_post_hooks.values()
    ):
        raise ValueError(f"{type(optimizer).__name__} folds its steps already. Fix: use it as it is")
    _check_parameters(optimizer)
    for module in modules_of(_parameters(optimizer)).values():
        module.hold_low()
    optimizer.register_step_post_hook(_fold)
    return optimizer


def _fold(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    skipped = getattr(optimizer, "found_inf", None)  # GradScaler tells a fused optimizer to leave its parameters
    if skipped is not None and bool(skipped):
        return
    modules = modules_of(_parameters(optimizer))
    stepped: list[tuple[LowRankLinear, float]] = []
    for group in optimizer.param_groups:
        decay = float(group["lr"]) * float(group.get("weight_decay", 0.0))
        for parameter in group["params"]:
            module = modules.get(id(parameter))
            if module is not None and (parameter.grad is not None or not is_zero(parameter)):
                stepped.append((module, decay))
    _refuse_not_finite([module for module, _ in stepped])
    for module, decay in stepped:
        module.fold(decay)


@torch.no_grad()
def _refuse_not_finite(modules: list[LowRankLinear]) -> None:
    """Refuse a step with NaN or Inf as a whole: no weight has it then, and no L is left over."""
    bad = [module for module in modules if not is_finite(module.low)]
    if bad:
        for module in modules:
            module.low.zero_()
        raise ValueError(
            f"the optimizer's step for {len(bad)} of {len(modules)} weights, the first [{bad[0].out_features}, "
            f"{bad[0].in_features}], holds NaN or Inf: their gradients did. No weight has changed; moments of the "
            "optimizer may hold NaN too. Fix: torch.amp.GradScaler with float16; or a lower learning rate, and start "
            "again from a checkpoint"
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_parameters(optimizer: torch.optim.Optimizer) -> None:
    if not modules_of(_parameters(optimizer)):
        raise ValueError(
            f"no parameter of this {type(optimizer).__name__} is a low-rank one of a model in Q-GaLore training: it "
            "was made before qcompile.train, which replaced the weights that it has, or from another model. "
            "Fix: make it afterwards, from the parameters that the model has then"
        )


class QGaLoreAdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in 8 bits, blocks of 256, that folds its steps into the weights itself.

    A step goes from the moments into the codes; the low-rank parameters, always zero, then need no memory.

    Source: AdamW (arXiv:1711.05101); 8-bit moments (arXiv:2110.02861); Q-GaLore (arXiv:2407.08296).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """As torch.optim.AdamW, but for the decay, which is off.

        Args:
            params: of a model in Q-GaLore training, or groups of them.
            lr: learning rate.
            betas: of the moments.
            eps: added to the root of the second moment.
            weight_decay: decoupled.

        Raises:
            ValueError: a value out of its range; none of the parameters is a low-rank one; they are sharded (FSDP).
        """
        for name, value, right in (
            ("lr", float(lr), float(lr) >= 0.0),
            ("betas", betas, all(0.0 <= beta < 1.0 for beta in betas)),
            ("eps", eps, eps > 0.0),
            ("weight_decay", weight_decay, weight_decay >= 0.0),
        ):
            if not right:
                raise ValueError(
                    f"QGaLoreAdamW8bit: {name} is {value!r}. Fix: lr and weight_decay >= 0, eps > 0, betas in [0, 1)"
                )
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        _check_parameters(self)
        if any(is_sharded(parameter) for parameter in _parameters(self)):
            raise ValueError(
                "QGaLoreAdamW8bit takes no parameters that are sharded (FSDP): blocks of its moments would end at "
                "other places. Fix: qcompile.optim.fold_after(torch.optim.AdamW(..)), or DistributedDataParallel"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer; before the first step it frees the low-rank parameters too.

        A compiled model that saw them whole at the first step would be compiled once more at the second.
        """
        super().zero_grad(set_to_none)
        if not _is_distributed():  # DistributedDataParallel may yet be made, and writes to them
            for module in modules_of(_parameters(self)).values():
                module.free_low()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: computes the loss again, as of any optimizer.

        Raises:
            ValueError: NaN or Inf in a gradient, or a sparse one; nothing has then changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for parameter in _parameters(self) if parameter.grad is not None]
        _check_gradients(parameters)
        modules = modules_of(parameters)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, modules.get(id(parameter)))
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], module: LowRankLinear | None) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                _store(state, name, torch.zeros_like(gradient, memory_format=torch.contiguous_format))
        state["step"] += 1
        (first, second), count = group["betas"], float(state["step"])
        average = _moment(state, "exp_avg").lerp_(gradient, 1.0 - first)
        square = _moment(state, "exp_avg_sq").mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
        root = (square.sqrt() / (1.0 - second**count) ** 0.5).add_(group["eps"])
        lr = float(group["lr"])
        decay = lr * group["weight_decay"]
        step = (average / root).mul_(-lr / (1.0 - first**count))
        if module is not None:
            module.fold(decay, step)
            module.free_low()  # not before: DistributedDataParallel, when it is made, writes to all parameters
        else:
            parameter.mul_(1.0 - decay).add_(step.to(parameter.dtype))
        _store(state, "exp_avg", average)
        _store(state, "exp_avg_sq", square)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; codes and scales keep their dtype, which torch would make that of the parameters."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(saved, _parameters(self), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[parameter][name] = value.to(parameter.device).clone()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_gradients(parameters: list[Tensor]) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if any(gradient.is_sparse for gradient in gradients):
        raise ValueError("QGaLoreAdamW8bit takes no sparse gradients. Fix: nn.Embedding(.., sparse=False)")
    bad = [list(gradient.shape) for gradient in gradients if not is_finite(gradient)]
    if bad:
        raise ValueError(
            f"QGaLoreAdamW8bit: NaN or Inf in {len(bad)} of {len(gradients)} gradients, the first of shape {bad[0]}; "
            "nothing has changed. Fix: torch.amp.GradScaler with float16; or skip this step by zero_grad()"
        )


def _store(state: dict[str, Any], name: str, moment: Tensor) -> None:
    """Put a moment, float32, into the state: as codes, or as it is where the parameter is small."""
    if moment.numel() < _SMALL:
        state[name] = moment
    else:
        state[name], state[f"{name}_scale"] = to_codes(moment, signed=name == "exp_avg")


def _moment(state: dict[str, Any], name: str) -> Tensor:
    value: Tensor = state[name]
    if value.dtype != torch.uint8:
        return value
    return from_codes(value, state[f"{name}_scale"], signed=name == "exp_avg")
