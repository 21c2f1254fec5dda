"""While a model is traced fake tensors stand for its stored ones, and afterwards it is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qcompile.ir.capture import capture
from qcompile.ir.stand_ins import stand_ins
from qcompile.memory.stored_tensor import StoredTensor


class Tied(nn.Module):
    """A table that is also the last matrix, a buffer, and a bias in memory."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(8, 6), nn.Linear(6, 8)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.rand(6))

    def forward(self, ids):
        return self.head(self.table(ids) * self.scale)


def stored(tensor, reads):
    def read():
        reads.append(tuple(tensor.shape))
        return tensor.clone()

    return StoredTensor(tensor, read)


@pytest.fixture
def model():
    """A float model, the same one with stored tensors, and what was read."""
    plain, streamed, reads = Tied(), Tied(), []
    plain.requires_grad_(False)
    weight = nn.Parameter(stored(plain.table.weight.detach(), reads), requires_grad=False)
    streamed.table.weight = streamed.head.weight = weight
    streamed.head.bias = plain.head.bias
    streamed.register_buffer("scale", stored(plain.scale, reads))
    return plain, streamed, reads


def test_shapes_stand_in_and_ties_stay(model):
    _, streamed, reads = model
    before = [streamed.table.weight, streamed.head.weight, streamed.head.bias, streamed.scale]
    ids = torch.tensor([[1, 2]])
    with stand_ins(streamed, [ids]) as traced:
        (fake,) = traced
        assert isinstance(fake, FakeTensor) and fake.shape == ids.shape
        weight, scale = streamed.table.weight, streamed.scale
        assert isinstance(weight.data, FakeTensor) and isinstance(weight, nn.Parameter)
        assert isinstance(scale, FakeTensor) and not isinstance(scale, nn.Parameter)
        assert streamed.head(streamed.table(fake)).shape == (1, 2, 8)
        assert streamed.head.bias is before[2]
        storages = {p.untyped_storage()._cdata for p in (streamed.table.weight, streamed.head.weight)}
        assert len(storages) == 1
    after = [streamed.table.weight, streamed.head.weight, streamed.head.bias, streamed.scale]
    assert all(a is b for a, b in zip(after, before, strict=True)) and not reads


def test_they_go_when_tracing_fails(model):
    _, streamed, _ = model
    before = streamed.table.weight
    with pytest.raises(KeyError), stand_ins(streamed, []):
        raise KeyError
    assert streamed.table.weight is before and isinstance(streamed.scale, StoredTensor)


def test_a_model_in_memory_is_traced_as_it_is(model):
    plain, _, _ = model
    inputs, weight = [torch.tensor([[1, 2]])], plain.table.weight
    with stand_ins(plain, inputs) as traced:
        assert traced is inputs and plain.table.weight is weight and type(plain.scale) is torch.Tensor


def test_a_captured_program_has_the_stored_tensors_and_computes_the_same(model):
    plain, streamed, reads = model
    ids = torch.tensor([[1, 2, 5]])
    want, program = capture(plain, (ids,)), capture(streamed, (ids,))
    assert not reads, "tracing reads nothing"
    assert [n.name for n in program.graph.nodes] == [n.name for n in want.graph.nodes]
    assert program.weights.keys() == want.weights.keys() and program.aliases == want.aliases
    stored_names = {name for name, weight in program.weights.items() if isinstance(weight, StoredTensor)}
    assert len(stored_names) == 2
    assert torch.equal(program(ids)[0], want(ids)[0]) and reads
    other = torch.tensor([[7, 0]])
    assert torch.equal(streamed(other), plain(other))
