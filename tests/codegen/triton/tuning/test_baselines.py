"""The baselines are called as their documentation says."""

from __future__ import annotations

import sys
import types

import torch
from kernel_cases import DEVICE  # noqa: F401  also gives the interpreter a correct bfloat16

from qcompile.codegen.triton.tuning.baselines import CODE_DTYPES, CUBLAS, WeightCopies, random_weight, timed_linears


def test_gemlite_is_called_as_its_readme_says(monkeypatch):
    """Its layers here are a stand-in with the signatures of 0.6."""
    made = []

    class GemLiteLinear:
        def __init__(self, W_nbits=4, group_size=64, in_features=None, out_features=None, input_dtype=None,  # noqa: N803
                     output_dtype=None, acc_dtype=None, scaled_activations=False):  # fmt: skip
            made.append((W_nbits, group_size, in_features, out_features, input_dtype, output_dtype))

        def pack(self, W_q, scales, zeros, bias=None):  # noqa: N803
            assert W_q.dtype == torch.uint8 and W_q.shape == (32, 256) and int(W_q.max()) < 16
            assert scales.shape == zeros.shape == (32 * 2, 1)
            self.weight = ((W_q.view(64, 128) - zeros) * scales).view(32, 256)

        def __call__(self, x):
            return torch.nn.functional.linear(x, self.weight)

    dtypes = types.SimpleNamespace(BF16="bf16")
    monkeypatch.setitem(sys.modules, "gemlite", types.SimpleNamespace(GemLiteLinear=GemLiteLinear, DType=dtypes))
    weights = WeightCopies(256, 32, 2, torch.device("cpu"))
    linear = dict(timed_linears(weights, 3))["GemLite w4a16"]()
    assert linear.call(1).shape == (3, 32) and made == [(4, 128, 256, 32, "bf16", "bf16")] * 2


def test_cublas_is_the_first_and_every_copy_is_a_tensor_of_its_own():
    weights = WeightCopies(64, 32, 3, torch.device("cpu"))
    assert next(timed_linears(weights, 1))[0] == CUBLAS
    for kind, dtype in CODE_DTYPES.items():
        copies = getattr(weights, kind)
        assert len({copy.data_ptr() for copy in copies}) == 3 and copies[0].dtype == dtype
        assert copies[0].shape == (32, 64) and copies is getattr(weights, kind)


def test_values_are_those_of_a_generator_of_their_own():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (WeightCopies(128, 32, 2, torch.device("cpu")) for _ in range(2))
    for make in (
        lambda w: w.normal(4, 128),
        lambda w: w.uniform(4, 2),
        lambda w: w.integers(16, 32, 128),
        lambda w: w.codes("int8", 32),
        lambda w: random_weight(128, 32, w.device),
        lambda w: w.int4[1].packed,
        lambda w: w.dense[1],
    ):
        values = make(first)
        assert torch.equal(values, make(again)) and values.float().std() > 0
    assert int(first.integers(16, 1000).max()) == 15 and 0 <= float(first.uniform(99).min()) < 0.2
    assert not torch.equal(first.dense[0], first.dense[1]), "copies of one weight"
    assert torch.equal(torch.get_rng_state(), before)
