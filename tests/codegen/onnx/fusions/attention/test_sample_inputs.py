"""Inputs of a decoder's graph of any size."""

from __future__ import annotations

import torch
from onnx_models import trace_decoder
from zoo import build

from qcompile.codegen.onnx.fusions.attention.sample_inputs import SampleInputs


def test_inputs_have_the_sizes_that_are_asked_for():
    program = trace_decoder(build("llama")).program
    samples = SampleInputs(program)
    assert (samples.batch, samples.new, samples.past) == (2, 3, 5)
    for sizes, shapes in (
        ({}, [(2, 3), (2, 8), (2, 2, 5, 16)]),
        (dict(batch=1, new=4, past=0), [(1, 4), (1, 4), (1, 2, 0, 16)]),
    ):
        values = samples.values(**sizes)
        assert list(values) == program.inputs
        assert [tuple(values[n].shape) for n in (samples.ids, samples.mask, samples.caches[-1])] == shapes
        assert bool((values[samples.mask] == 1).all()) and values[samples.ids].dtype is torch.long
    cache = samples.values(past=10**6)[samples.caches[0]]
    assert cache.shape[2] == 10**6 and cache.untyped_storage().nbytes() == 4, "without memory"
