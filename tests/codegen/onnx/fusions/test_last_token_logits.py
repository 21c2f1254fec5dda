"""The product that makes the logits gets one row for each text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_models import load_graph, scale_weights
from torch import nn
from zoo import build, example

import qcompile
import qcompile.codegen.onnx.ops  # noqa: F401  registers the operators
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.last_token_logits import keep_last_token_logits, last_tokens
from qcompile.generation.onnx_session import FolderError, Session
from qcompile.ir.capture import capture


class Head(nn.Module):
    """Logits behind what models put there."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.embedding, self.linear = kind, nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids, mask):
        x = self.embedding(ids)
        logits = self.linear(x.flatten(0, 1)).unflatten(0, ids.shape) if self.kind == "flat" else self.linear(x)
        if self.kind == "cap":
            return torch.tanh(logits / 30.0) * 30.0
        if self.kind == "cast":
            return logits.double()
        return logits.softmax(-1) if self.kind == "softmax" else logits


IDS, MASK = torch.tensor([[3, 5, 7], [2, 4, 6]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize("kind", ["none", "cap", "cast"])
def test_logits_of_the_last_token_that_is_not_padding(kind):
    torch.manual_seed(0)
    program = capture(Head(kind).eval(), (IDS, MASK), {})
    logits = program(IDS, MASK)[0]
    assert keep_last_token_logits(program) is None
    assert torch.allclose(program(IDS, MASK)[0], torch.stack([logits[0, 2:], logits[1, 1:2]]), atol=1e-6)


@pytest.mark.parametrize("kind,words", [("softmax", "is not found"), ("flat", "is not found")])
def test_what_is_not_tokenwise_is_an_obstacle(kind, words):
    program = capture(Head(kind).eval(), (IDS, MASK), {})
    nodes = len(program.graph.nodes)
    obstacle = keep_last_token_logits(program)
    assert isinstance(obstacle, Obstacle) and words in obstacle.reason
    assert len(program.graph.nodes) == nodes, "nothing is changed"


def test_a_text_of_padding_only_gives_its_first_token():
    x = torch.arange(6.0).reshape(2, 3, 1)
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    assert last_tokens(x, mask).flatten().tolist() == [0.0, 4.0]


def test_last_tokens_of_padded_texts():
    x = torch.arange(3 * 4, dtype=torch.float32).reshape(3, 4, 1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert last_tokens(x, mask).flatten().tolist() == [3.0, 5.0, 8.0]
    behind = torch.ones(3, 9, dtype=torch.long)  # five tokens of a cache before them
    assert last_tokens(x, behind).flatten().tolist() == [3.0, 7.0, 11.0]
    one = torch.tensor([[1, 1, 0, 0, 1]])  # a padded text that goes on, one token at a time
    assert last_tokens(torch.ones(1, 1, 1), one).shape == (1, 1, 1)


def genai_texts(folder, prompts, length=14):
    """What onnxruntime-genai generates greedily."""
    import onnxruntime_genai as genai

    parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
    parameters.set_search_options(max_length=length, min_length=length, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(i).tolist() for i in range(len(prompts))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,recipe,contrib_ops",
    [
        ("llama", "int4-cpu", True), ("llama", "w4a16", False), ("gpt2", "int4-cpu", True), ("gemma3", "w4a16", True),
        ("gemma2", "w4a16", True),  # a soft cap behind the logits
    ],
)  # fmt: skip
def test_the_last_logits_are_enough_to_generate(name, recipe, contrib_ops, tmp_path):
    model = build(name)
    scale_weights(model, 6)  # what layers add must outweigh the token, or it repeats for ever
    options = dict(accuracy_level=1 if contrib_ops else 4, contrib_ops=contrib_ops, progress=False)
    qcompile.export_onnx(model, tmp_path / "all", recipe, [example(name)], **options)
    qcompile.export_onnx(model, tmp_path / "last", recipe, [example(name)], last_logits=True, **options)
    prompts = [[5, 9, 17, 33], [90, 8, 51, 0]]  # genai pads the shorter behind
    if recipe == "int4-cpu":  # prefill of "all" rounds what the logits read, and a near tie may fall to the other side
        prompts = [prompt[:2] for prompt in prompts]
    assert genai_texts(tmp_path / "all", prompts) == genai_texts(tmp_path / "last", prompts)
    session, ids = Session(tmp_path / "last"), torch.tensor([[5, 9, 17, 33, 90, 8, 51, 2]])
    every, last = Session(tmp_path / "all").step(ids.numpy(), None)[0], session.step(ids.numpy(), None)[0]
    assert np.linalg.norm(last - every[:, -1:]) < 0.02 * np.linalg.norm(last) < np.linalg.norm(last - every[:, -2:-1])
    assert session.step(ids.numpy(), None)[0].shape == (1, 1, 128)
    assert len(list(session.stream(ids, 4))) == 4
    with pytest.raises(FolderError, match="last token's logits only"):
        session(input_ids=ids)
    if recipe == "int4-cpu":
        (choice,) = [node for node in load_graph(tmp_path / "last")[0].node if node.op_type == "If"]
        prefill = next(a.g for a in choice.attribute if a.name == "else_branch")
        assert sum(node.op_type == "MatMulNBits" for node in prefill.node) == 1, "one row needs no int8"
