"""A stored tensor is the plain tensor of its values: whatever is done to it, and read no sooner than needed."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcompile.memory.fingerprint import as_bytes
from qcompile.memory.stored_tensor import StoredTensor, loaded


class Source:
    """Values, and how often they were read."""

    def __init__(self, values):
        self.values, self.reads = values, 0

    def __call__(self):
        self.reads += 1
        return self.values.clone()

    def stored(self):
        return StoredTensor(self.values, self)


def values_of(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found, plain):
    """Equal in dtype, shape, strides' view and every bit."""
    assert isinstance(found, StoredTensor)
    assert (found.shape, found.dtype) == (plain.shape, plain.dtype)
    values = found.read()
    assert type(values) is torch.Tensor and (values.shape, values.dtype) == (plain.shape, plain.dtype)
    assert torch.equal(as_bytes(values.contiguous()), as_bytes(plain.contiguous()))


@st.composite
def moves(draw, shape):
    """A move that a tensor of a shape allows, as a function of tensors."""
    rank = len(shape)
    axis = draw(st.integers(0, rank - 1)) if rank else 0
    other = draw(st.integers(0, rank - 1)) if rank else 0
    size = shape[axis] if rank else 1
    start, stop = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    index, order = draw(st.integers(0, max(0, size - 1))), draw(st.permutations(range(rank)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    chosen = {
        "to": lambda t: t.to(dtype),
        "copy": lambda t: t.to(dtype, copy=True),
        "float": lambda t: t.float(),
        "detach": lambda t: t.detach(),
        "data": lambda t: t.data,
        "unsqueeze": lambda t: t.unsqueeze(axis),
        "reshape": lambda t: t.reshape(-1),
        "contiguous": lambda t: t.contiguous(),
        "expand": lambda t: t.unsqueeze(0).expand(2, *t.shape),
        "stack": lambda t: torch.stack([t, t.detach()]),
        "squeeze": lambda t: t.squeeze(),
        "resolved": lambda t: t.resolve_conj().resolve_neg(),
    }
    if rank and 0 not in shape:
        chosen |= {
            "transpose": lambda t: t.transpose(axis, other),
            "permute": lambda t: t.permute(order),
            "slice": lambda t: t[(slice(None),) * axis + (slice(start, stop),)],
            "narrow rows": lambda t: t[index:],
            "select": lambda t: t.select(axis, index) if t.ndim > 1 else t,
            "cat": lambda t: torch.cat([t, t], axis),
            "split": lambda t: t.split(max(1, index), axis)[-1],
            "sizes": lambda t: t.split([index, size - index], axis)[1],
            "chunk": lambda t: t.chunk(2, axis)[0],
            "unbind": lambda t: t.unbind(axis)[index] if t.ndim > 1 else t,
            "view": lambda t: t.contiguous().view(1, -1),
            "flatten": lambda t: t.flatten(),
            "squeeze one": lambda t: t.squeeze(axis),
            "movedim": lambda t: t.movedim(axis, other),
            "index_select": lambda t: t.index_select(axis, torch.tensor([index, 0, index])),
        }
    return chosen[draw(st.sampled_from(sorted(chosen)))]


@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_chains_of_moves_read_nothing_and_give_the_bits_of_the_plain_tensor(data, shape, seed):
    source = Source(values_of(*shape, seed=seed))
    found, plain = source.stored(), source.values
    for _ in range(data.draw(st.integers(1, 6))):
        move = data.draw(moves(tuple(plain.shape)))
        found, plain = move(found), move(plain)
        assert found.stride() == plain.stride()
    assert source.reads == 0
    same(found, plain)
    assert source.reads == 1


@pytest.mark.parametrize(
    "compute",
    [
        lambda t: t.abs(),
        lambda t: t @ t.t(),
        lambda t: t + 1,
        lambda t: nn.functional.linear(torch.ones(2, 6), t),
        lambda t: nn.functional.embedding(torch.tensor([3, 0]), t),
        lambda t: t[torch.tensor([2, 2])],
        lambda t: torch.from_numpy(t.numpy().copy()),
        lambda t: torch.tensor(t.tolist()),
        lambda t: t.clone(),
        lambda t: torch.cat([t.t(), torch.ones(6, 1)], 1).sum(0),
        lambda t: t.amax(1).float(),
        lambda t: torch.linalg.qr(t)[1],
    ],
)
def test_what_computes_reads_once_and_gives_plain_tensors(compute):
    source = Source(values_of(4, 6))
    found = compute(source.stored())
    assert type(found) is torch.Tensor and torch.equal(found, compute(source.values)) and source.reads == 1


def test_looking_reads_nothing():
    source = Source(values_of(4, 6, dtype=torch.bfloat16))
    tensor = source.stored()
    assert (tensor.ndim, len(tensor), tensor.numel(), tensor.nbytes, tensor.element_size()) == (2, 4, 24, 48, 2)
    assert tensor.is_floating_point() and tensor.device.type == "cpu" and not tensor.requires_grad
    assert tensor.is_contiguous() and not tensor.t().is_contiguous() and tensor.t().stride() == (1, 6)
    assert repr(tensor) == "StoredTensor([4, 6], torch.bfloat16)" and len({tensor, tensor}) == 1
    assert source.reads == 0


def test_several_looks_at_one_tensor_read_it_once():
    first, second = Source(values_of(4, 6)), Source(values_of(4, 6, seed=1))
    tensor, other = first.stored(), second.stored()
    for _ in range(3):
        assert torch.equal(tensor.abs(), first.values.abs())
    assert first.reads == 1
    assert torch.equal(other.abs(), second.values.abs())
    assert torch.equal(tensor.abs(), first.values.abs())
    assert (first.reads, second.reads) == (2, 1), "one tensor's values are kept"


def test_a_clone_may_be_written_to():
    source = Source(values_of(4, 6))
    tensor = source.stored()
    copied = tensor.clone()
    copied[0] = 7
    copied.mul_(2)
    assert torch.equal(tensor.abs(), source.values.abs())


def add_equal(tensor):
    tensor += 1


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.copy_(torch.zeros(4, 6)),
        lambda t: t.zero_(),
        lambda t: t.__setitem__(0, 1),
        lambda t: t.fill_(2.0),
        add_equal,
        lambda t: nn.init.zeros_(t),
        lambda t: torch.add(torch.ones(4, 6), 1, out=t),
        lambda t: torch._foreach_add_([t], 1),
        lambda t: torch.ops.aten.fill_.Scalar(t, 1.0),
    ],
)
def test_nothing_writes_to_it(write):
    source = Source(values_of(4, 6))
    tensor = source.stored()
    with pytest.raises(
        RuntimeError, match=r"would write to StoredTensor\(\[4, 6\], .*lie in a file. Fix: write to a c"
    ):
        write(tensor)
    assert torch.equal(tensor.read(), source.values)


def test_a_module_of_stored_parameters():
    weight, bias = Source(values_of(4, 6)), Source(values_of(4))
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(weight.stored(), requires_grad=False)
    model.bias = nn.Parameter(bias.stored(), requires_grad=False)
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    assert isinstance(model.weight, nn.Parameter) and isinstance(model.weight, StoredTensor)
    copied = copy.deepcopy(model)
    assert isinstance(copied.weight, nn.Parameter) and copied.weight is not model.weight
    assert model.state_dict()["weight"] is model.weight, "ties of saved tensors are told by identity"
    model.to(torch.bfloat16)
    copied.double()
    assert weight.reads == bias.reads == 0
    same(model.weight, weight.values.bfloat16())
    same(copied.bias, bias.values.double())
    x = values_of(3, 6).bfloat16()
    want = nn.functional.linear(x, weight.values.bfloat16(), bias.values.bfloat16())
    assert torch.equal(model(x), want)


def test_ties_stay_ties():
    source = Source(values_of(6, 6))
    model = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    model[0].weight = nn.Parameter(source.stored(), requires_grad=False)
    model[1].weight = model[0].weight
    assert len(list(model.parameters())) == 1
    copied = copy.deepcopy(model).to(torch.float16)
    assert copied[0].weight is copied[1].weight and copied[0].weight.dtype == torch.float16
    state = model.state_dict()
    assert state["0.weight"] is state["1.weight"] and source.reads == 0


def test_it_is_pickled_as_what_it_stands_for():
    source = Source(values_of(4, 6))
    found = pickle.loads(pickle.dumps(source.stored()))
    assert type(found) is torch.Tensor and torch.equal(found, source.values)


def test_another_device_gets_the_values():
    source = Source(values_of(4, 6))
    assert source.stored().to("meta").is_meta


def test_threads_read_their_own_values():
    sources = [Source(values_of(40, 40, seed=seed)) for seed in range(3)]
    tensors = [source.stored() for source in sources]
    plain = [float(source.values.double().sum()) for source in sources]

    def look(number):
        return [float(tensors[(number + i) % 3].double().sum()) == plain[(number + i) % 3] for i in range(50)]

    with ThreadPoolExecutor(6) as pool:
        assert all(all(found) for found in pool.map(look, range(6)))


def test_arguments_are_loaded_in_any_nesting():
    source = Source(values_of(4, 6))
    plain = torch.ones(2)
    found = loaded({"a": [source.stored(), plain], "b": (1, "x", None)})
    assert type(found["a"][0]) is torch.Tensor and found["a"][1] is plain and found["b"] == (1, "x", None)


def test_a_read_that_fails_says_so():
    def gone():
        raise OSError("the disk is away")

    tensor = StoredTensor(torch.ones(2), gone).to(torch.float64)
    with pytest.raises(OSError, match="the disk is away"):
        tensor.abs()
