"""Attentions in standard ONNX operators: the same sums, and nothing copied to be multiplied."""

from __future__ import annotations

import collections

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.fusions.attention.decompose_sdpa import decompose_attentions
from qcompile.codegen.onnx.translate_graph import to_module
from qcompile.generation.onnx_session import Session
from qcompile.ir.capture import capture

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """Heads that share keys and values, repeated as models write it."""

    def __init__(self, heads: int, groups: int, repeat: str, scale: float | None, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.repeat, self.scale, self.causal = heads, groups, repeat, scale, causal

    def forward(self, query, key, value, mask=None):
        each, options = self.heads // self.groups, {}
        if self.repeat == "expanded":
            key, value = (t[:, :, None].expand(-1, -1, each, -1, -1).flatten(1, 2) for t in (key, value))
        elif self.repeat == "tiled":  # another order of heads: not shared by neighbors
            key, value = (t[:, None].expand(-1, each, -1, -1, -1).flatten(1, 2) for t in (key, value))
        elif self.repeat == "interleaved":
            key, value = (t.repeat_interleave(each, 1) for t in (key, value))
        elif self.repeat == "flag":
            options["enable_gqa"] = True
        elif self.repeat == "keys only":
            key = key[:, :, None].expand(-1, -1, each, -1, -1).flatten(1, 2)
            value = value.repeat(1, each, 1, 1)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.causal, scale=self.scale, **options
        )


def tensors(seed, heads, groups, new, total, mask):
    torch.manual_seed(seed)
    made = [torch.randn(2, h, t, 8, dtype=torch.float64) for h, t in ((heads, new), (groups, total), (groups, total))]
    if mask:
        visible = torch.rand(2, heads if mask == "heads" else 1, new, total) < 0.5
        visible[0, :, 0] = False  # a row that attends to nothing
        made.append(visible)
    return tuple(made)


@pytest.mark.slow
@given(
    st.integers(0, 99), st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]), st.integers(1, 5), st.integers(2, 6),
    st.sampled_from(["expanded", "interleaved", "tiled", "flag", "keys only"]),
    st.sampled_from([None, "shared", "heads"]), st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_the_same_values(seed, sizes, new, total, repeat, mask, scale):
    given_ = tensors(seed, *sizes, new, total, mask)
    model = Attention(*sizes, repeat, scale).eval()
    want = model(*given_)
    program = capture(model, given_)
    assert decompose_attentions(program) == 1 and not program.graph.find_nodes(op="call_function", target=SDPA)
    assert torch.allclose(to_module(program)(*given_)[0], want, atol=1e-12)
    if repeat in ("expanded", "interleaved", "flag"):
        kinds = {node.target for node in program.graph.nodes}
        assert not kinds & {torch.ops.aten.expand.default, torch.ops.aten.repeat_interleave.self_int}, "repeated"


@pytest.mark.parametrize("why", ["causal", "floats"])
def test_other_masks_stay(why):
    given_ = tensors(0, 4, 4, 5, 5, None)
    if why == "floats":
        given_ += (torch.randn(2, 1, 5, 5, dtype=torch.float64),)
    program = capture(Attention(4, 4, "one each", None, why == "causal").eval(), given_)
    assert decompose_attentions(program) == 0 and len(program.graph.find_nodes(op="call_function", target=SDPA)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_file_of_standard_operators_repeats_no_keys(name, tmp_path):
    """Of a text and its continuation."""
    model = build(name)
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    qcompile.export_onnx(model, tmp_path / "m", contrib_ops=False, progress=False)
    graph = onnx.load(str(tmp_path / "m/model.onnx"), load_external_data=False).graph
    kinds = collections.Counter(node.op_type for node in graph.node)
    layers = model.config.num_hidden_layers
    assert kinds["Softmax"] == layers and not kinds["IsNaN"]
    for node in graph.node:  # keys and values reach their products as the caches hold them
        if node.op_type == "Concat" and node.output[0].startswith("present"):
            consumers = [n.op_type for n in graph.node if node.output[0] in n.input]
            assert set(consumers) <= {"Transpose", "MatMul", "Shape"} and len(consumers) >= 1, consumers
    ids = example(name)["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids).logits
    session = Session(tmp_path / "m")
    first, cache = session.step(ids[:, :-3].numpy(), None)
    then, _ = session.step(ids[:, -3:].numpy(), cache)
    got = torch.cat([torch.from_numpy(first), torch.from_numpy(then)], 1)
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
