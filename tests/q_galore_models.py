"""Small models in Q-GaLore training, and GaLore by its formula, for the tests of its laws."""

from __future__ import annotations

import torch
from torch import nn

import qcompile
from qcompile.modules.low_rank_linear import LowRankLinear
from qcompile.passes import QGaLore
from qcompile.training.optim import QGaLoreAdamW8bit, fold_after

FLOAT = dict(weight=None, basis=None, factor=1)  # GaLore itself


def net(widths=(12, 20, 16, 8), *, dtype=torch.float32, seed=0, bias=True):
    """Linears and tanhs, whose gradients have full rank; the last one gives the output and is no site of Q-GaLore."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for k, n in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(k, n, bias=bias, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def prepared(model, **config):
    """The model, prepared in place by QGaLore with rank 4 and a gap of 3 but for `config`."""
    recipe = qcompile.Recipe("test", (QGaLore(**{"rank": 4, "gap": 3, **config}),))
    weight = next(model.parameters())
    qcompile.train(model, recipe, example=torch.randn(4, weight.shape[1], dtype=weight.dtype), progress=False)
    return model.train()


def data(step, rows=16, columns=12, outputs=8, dtype=torch.float32):
    """The inputs and labels of one step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return x, torch.randint(0, outputs, (rows,), generator=generator)


def loss_of(model, batch, scale=1.0):
    """The mean cross entropy of a batch, scaled."""
    x, labels = batch
    return nn.functional.cross_entropy(model(x), labels) * scale


def steps(model, optimizer, first, last, *, forward=None, accumulate=1):
    """Train from step `first` to `last`, excluded."""
    for step in range(first, last):
        optimizer.zero_grad()
        for part in range(accumulate):
            dtype = next(model.parameters()).dtype
            batch = data(step * accumulate + part, dtype=dtype)
            loss_of(forward or model, batch, 1 / accumulate).backward()
        optimizer.step()


def adamw(model, **options):
    """AdamW of torch, folded; no decay."""
    return fold_after(torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.0, **options}))


def eight_bits(model, **options):
    """AdamW with moments in 8 bits."""
    return QGaLoreAdamW8bit(model.parameters(), **{"lr": 1e-2, **options})


def weights(model):
    """Copies of the weights, module by module."""
    return [m.weight.detach().clone() for m in model if hasattr(m, "weight")]


def low_rank_linears(model):
    """The modules in training."""
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]


def state(model):
    """All weights and all state as one list of tensors."""
    return list(model.state_dict().values())


def equal_states(a, b):
    """Whether two models are bit for bit the same."""
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW in the basis of the gradient's first singular vectors, by the formula of arXiv:2403.03507."""

    def __init__(self, params, lr, rank, gap, scale, projected, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
        self.projected = {id(p) for p in projected}
        super().__init__(params, dict(lr=lr, rank=rank, gap=gap, scale=scale, betas=betas, eps=eps, decay=decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                s, (b1, b2) = self.state[p], group["betas"]
                low, left = id(p) in self.projected, p.ndim == 2 and p.shape[0] < p.shape[1]
                count = s["count"] = s.get("count", 0) + 1
                if low and (count - 1) % group["gap"] == 0:
                    u, _, vh = torch.linalg.svd(p.grad, full_matrices=False)
                    s["P"] = u[:, : group["rank"]].t() if left else vh[: group["rank"]]
                g = p.grad if not low else s["P"] @ p.grad if left else p.grad @ s["P"].t()
                s["m"] = b1 * s.get("m", torch.zeros_like(g)) + (1 - b1) * g
                s["v"] = b2 * s.get("v", torch.zeros_like(g)) + (1 - b2) * g * g
                m, v = s["m"] / (1 - b1**count), s["v"] / (1 - b2**count)
                step = -group["lr"] * m / (v.sqrt() + group["eps"])
                if low:
                    step = group["scale"] * (s["P"].t() @ step if left else step @ s["P"])
                p.mul_(1 - group["lr"] * group["decay"]).add_(step)
