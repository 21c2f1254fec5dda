"""Growing tensors, and the tokens that are dropped from float and quantized parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.modules.kv_states import GrowingTensor, PerChannelStates, PerTokenStates
from qcompile.numerics.format import Format


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_a_growing_tensor_is_what_was_appended(lengths):
    growing, pieces = GrowingTensor(), [torch.randn(2, 3, length, 4) for length in lengths]
    assert growing.nbytes == 0
    for piece in pieces:
        growing.append(piece)
    whole = torch.cat(pieces, -2)
    assert torch.equal(growing.read(), whole) and growing.nbytes == whole.nbytes
    growing.replace(lambda t: t[[1, 0, 0]])
    growing.append(pieces[0][[0, 1, 1]])
    assert torch.equal(growing.read(), torch.cat([whole[[1, 0, 0]], pieces[0][[0, 1, 1]]], -2))


@pytest.mark.parametrize("drop", [2, 5, 6])
def test_dropped_tokens_may_reach_into_the_float_ones(drop):
    states, x = PerTokenStates(Format("int8", zero="int"), 3, False, None), torch.randn(1, 2, 8, 16)
    states.append(x)
    before = states.read(torch.float32)
    assert torch.equal(before[:, :, :3], x[:, :, :3]) and not torch.equal(before[:, :, 3:], x[:, :, 3:])
    states.drop(drop)
    assert states.length == 8 - drop and torch.equal(states.read(torch.float32), before[:, :, : 8 - drop])
    states.append(x[:, :, 8 - drop :])
    assert torch.equal(states.read(torch.float32), before), "what comes again is quantized the same"


def test_sizes():
    x = torch.randn(5, 3, 7, 16)
    tokens, channels = (
        PerTokenStates(Format("int4", zero="int"), 2, True, torch.zeros(3, 16)),
        PerChannelStates(torch.ones(3, 16)),
    )
    for states in (tokens, channels):
        states.append(x)
        assert (states.batch, states.heads, states.length, states.width) == (5, 3, 7, 16)
    assert sum(t.nbytes for t in channels.tensors) == x.numel()
    # two float tokens; five of 16 codes in 8 bytes, a float16 scale and a byte of zero point
    assert sum(t.nbytes for t in tokens.tensors) == 5 * 3 * (2 * 16 * 4 + 5 * (8 + 2 + 1))


@pytest.mark.parametrize("form, stored", [("int8", torch.int8), ("fp8", torch.uint8)])
def test_codes_are_stored_as_integers(form, stored):
    """Few operators of PyTorch move float8 values, as reordering beams does."""
    channels = PerChannelStates(torch.ones(3, 16), Format(form))
    channels.append(torch.randn(1, 3, 4, 16))
    assert channels.codes.read().dtype == stored


def states(bits=8, hadamard=False, center=None, sinks=0, tokens=4):
    one = PerTokenStates(Format.parse(f"int{bits}/row/zero"), sinks, hadamard, center)
    one.append(torch.randn(1, 2, tokens, 16))
    return one


CENTERS = torch.full((2, 16), 0.5), torch.full((2, 16), 0.25)


@pytest.mark.parametrize(
    "other",
    [{"bits": 4}, {"hadamard": True}, {"center": CENTERS[0]}, {"sinks": 2}],
    ids=["bits", "rotation", "center", "float tokens"],
)
def test_codes_of_another_meaning_are_not_read_as_ones_own(other):
    assert states().reads_as(states()) and states(**other).reads_as(states(**other, tokens=6))
    assert not states().reads_as(states(**other)) and not states(**other).reads_as(states())


def test_another_center_is_another_meaning():
    assert not states(center=CENTERS[0]).reads_as(states(center=CENTERS[1]))


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("center", [None, CENTERS[0]])
def test_what_is_added_and_multiplied_lies_where_the_keys_are(hadamard, center):
    """Rotations and centers are made on a CPU; the meta device refuses to meet them there, as a GPU would."""
    found = PerTokenStates(Format.parse("int4/row/zero"), 1, hadamard, center)
    for tokens in (5, 1):
        found.append(torch.empty(1, 2, tokens, 16, dtype=torch.bfloat16, device="meta"))
    assert found.length == 6 and found.read(torch.bfloat16).device.type == "meta"
    for made in (found.rotation, found.center):  # not every product with the meta device refuses a CPU
        assert made is None or made.device.type == "meta"
    assert (found.rotation is not None) == hadamard
