"""Calls of every form as flat tensors, and back."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from torch import nn
from transformers import BatchEncoding, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from qcompile.ir.call_tree import CallTree, map_leaves, shape_of, tensors_of


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    k: int = 2


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


Pair = collections.namedtuple("Pair", "x y")
ONE, TWO = torch.ones(2), torch.zeros(3)

FORMS = [
    ({"x": ONE, "k": 3}, ["v['x']", "v['k']"]),
    (collections.OrderedDict(x=ONE), ["v['x']"]),
    (BatchEncoding({"x": ONE}), ["v['x']"]),
    (BaseModelOutput(last_hidden_state=ONE), ["v['last_hidden_state']"]),
    ([ONE, [TWO, None]], ["v[0]", "v[1][0]", "v[1][1]"]),
    ((ONE, "mode"), ["v[0]", "v[1]"]),
    (Pair(ONE, TWO), ["v[0]", "v[1]"]),
    (Frozen(ONE), ["v.x", "v.k"]),
    (Slotted(ONE), ["v.x"]),
    (torch.Size([2, 3]), ["v"]),
]


@pytest.mark.parametrize("value,paths", FORMS, ids=lambda v: type(v).__name__)
def test_forms_keep_their_type_and_get_new_leaves(value, paths):
    found = {}
    again = map_leaves(value, lambda p, leaf: found.setdefault(p, leaf), "v")
    assert type(again) is type(value) and list(found) == paths
    doubled = map_leaves(value, lambda _p, leaf: leaf + 1 if isinstance(leaf, torch.Tensor) else leaf, "v")
    assert [t.sum().item() for t in tensors_of(doubled)] == [(t + 1).sum().item() for t in tensors_of(value)]
    assert ONE.tolist() == [1, 1] and TWO.tolist() == [0, 0, 0]


def test_a_cache_as_argument_is_walked_and_as_result_is_state():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    call = CallTree.of((), {"past": cache})
    assert len(call.tensors) == 2
    other = call.with_tensors([t + 5 for t in call.tensors.values()])
    assert other.kwargs["past"].layers[0].keys.unique().item() == 6 and cache.layers[0].keys.unique().item() == 1
    assert tensors_of({"logits": ONE, "past_key_values": cache, "none": None}) == [ONE]
    assert tensors_of((None, Pair(TWO, cache)))[0] is TWO


def test_objects_that_lead_back_to_themselves_are_constants():
    loop = type("Loop", (), {})()
    loop.own = loop
    assert CallTree.of((loop,), {}).constants == {"argument 1": loop}


@pytest.mark.parametrize(
    "other,words",
    [
        ({"x": TWO, "k": 1}, None),
        ({"k": 1}, "lacks 'x', which the first has"),
        ({"x": ONE, "k": 1, "m": ONE}, "has 'm', which the first lacks"),
        ({"x": ONE, "k": 2}, "gives 'k' as 2, the first as 1: a constant of the graph"),
        ({"x": 7, "k": 1}, "gives 'x' as int, the first as Tensor"),
        ({"x": ONE, "k": True}, "gives 'k' as True, the first as 1: a constant of the graph"),
    ],
)
def test_differences_name_the_key(other, words):
    assert CallTree.of((), other).difference(CallTree.of((), {"x": ONE, "k": 1}), "the first") == words


def test_arguments_have_the_names_of_the_parameters():
    class Module(nn.Module):
        def forward(self, features, *rest, scale=1):
            return features

    call = CallTree.of(({"x": ONE}, TWO), {"scale": 2}, Module())
    assert list(call.leaves) == ["features['x']", "argument 2", "scale"]
    assert str(call) == "features['x'] float32 [2], argument 2 float32 [3], scale 2" and shape_of(3) == "3"
