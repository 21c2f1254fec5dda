"""AWQ's layout: read by its definition, nibble by nibble, it gives the model's weights."""

from __future__ import annotations

import pytest
import torch
from served_models import quantized

from qcompile.checkpoint.writers.awq_layout import awq_layout, check_awq
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.numerics.format import Format

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of channel c among the nibbles of its word


def by_definition(packed):
    """int32 [rows, N / 8] -> [rows, N]."""
    return torch.tensor(
        [[(row[c // 8] % 2**32) >> (4 * PLACES[c % 8]) & 15 for c in range(8 * len(row))] for row in packed.tolist()]
    )


@pytest.mark.parametrize("bias", [False, True])
def test_it_holds_the_weights(bias):
    model = quantized("int4/group64/zero/f16", dtype=torch.float16, bias=bias)
    layout = awq_layout(model)
    path = "model.layers.0.self_attn.q_proj"
    part = {name.rpartition(".")[2]: t for name, t in layout.tensors.items() if name.startswith(f"{path}.")}
    groups = torch.arange(128) // 64
    centered = by_definition(part["qweight"]) - by_definition(part["qzeros"])[groups]
    assert torch.equal((part["scales"].float()[groups] * centered).t(), model.get_submodule(path).weight)
    assert ("bias" in part) == bias and all(t.is_contiguous() for t in part.values())
    config = layout.quantization_config
    assert config["group_size"] == 64 and config["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize("weight", ["int4/group32/bf16", "int4/row/zero/bf16", "int3/group32/zero/bf16"])
def test_what_it_cannot_say(weight):
    with pytest.raises(ExportError, match=f"^layer: weights in {weight}.*Fix: use int4/group128/zero/bf16"):
        check_awq("layer", Format.parse(weight), None, 128, torch.bfloat16)
    with pytest.raises(ExportError, match="activations in int8/row"):
        check_awq("layer", Format.parse("int4/group32/zero/bf16"), Format("int8"), 128, torch.bfloat16)
