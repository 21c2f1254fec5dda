"""A module that takes the place of another is called wherever that was, with its hooks."""

from __future__ import annotations

import torch
from torch import nn

from qcompile.modules.take_place import take_place


def test_every_path_leads_to_the_new_module():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared))
    new = nn.Identity()
    take_place(model, shared, new)
    assert model[0] is new and model[1][1] is new


def test_hooks_move_and_their_handles_remove_them():
    model, order = nn.Sequential(nn.Linear(4, 4)), []
    old = model[0].eval()
    handles = [
        old.register_forward_pre_hook(lambda m, args: order.append("before")),
        old.register_forward_hook(lambda m, args, kwargs, out: order.append("after"), with_kwargs=True),
        old.register_state_dict_post_hook(lambda m, state, prefix, meta: order.append("state")),
    ]
    new = nn.Linear(4, 4)
    take_place(model, old, new)
    assert not new.training
    model(torch.ones(1, 4))
    model.state_dict()
    assert order == ["before", "after", "state"]
    old(torch.ones(1, 4))  # a wrapper may call it, and the hooks must not run twice
    assert len(order) == 3
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 4))
    assert len(order) == 3


def test_backward_hooks_move():
    model, grads = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_full_backward_hook(lambda m, given, got: grads.append(m))
    new = nn.Linear(4, 4)
    take_place(model, model[0], new)
    model(torch.ones(1, 4, requires_grad=True)).sum().backward()
    assert grads == [new]
