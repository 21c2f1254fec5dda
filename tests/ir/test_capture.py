"""From modules and Dynamo's graphs to programs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

from qcompile.ir.capture import CaptureError, attribute_path, capture, capture_dynamo, has_tensor_input
from qcompile.ir.node_meta import DYNAMO_INDEX, STATIC, WEIGHT


@pytest.mark.parametrize(
    "source,path",
    [
        ("L['self']._modules['a']._parameters['weight']", "a.weight"),
        ("L['self']._modules['layers']._modules['0']._modules['up']._buffers['scale']", "layers.0.up.scale"),
        ('L["fn"]._modules["a"]._modules["b"]._parameters["w"]', "a.b.w"),
        ("L['self']._parameters['weight']", "weight"),
        ("L['x']", None),
        ("L['self'].config.rate", None),
    ],
)
def test_attribute_paths(source, path):
    assert attribute_path(source) == path


def test_a_model_that_breaks_the_graph_is_refused_with_the_reason():
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureError, match="Branch cannot be traced to one graph: .*Fix: make the named line"):
        capture(Branch(), (torch.randn(2, 3),))


def test_weights_are_the_models_own_tensors():
    model = build("llama")
    program = capture(model, (), example("llama"))
    tensors = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    assert all(weight.data_ptr() in tensors for weight in program.weights.values())


@pytest.mark.parametrize("args", [torch.ones(3, 8), [torch.ones(3, 8)], {"input": torch.ones(3, 8)}])
def test_an_example_may_be_any_batch_that_quantize_takes(args):
    program = capture(nn.Linear(8, 6), args)
    assert [tuple(node.meta["val"].shape[1:]) for node in program.inputs] == [(8,)]


@pytest.mark.parametrize("dynamic", [True, False])
def test_sizes_stay_symbolic_where_they_may(dynamic):
    program = capture(nn.Linear(8, 6), (torch.randn(3, 5, 8),), dynamic=dynamic)
    shape = program.inputs[0].meta["val"].shape
    assert [isinstance(size, torch.SymInt) for size in shape] == [dynamic, dynamic, False]
    assert program(torch.randn(2, 7, 8))[0].shape == (2, 7, 6)


@pytest.mark.parametrize("fails", [False, True])
def test_the_cache_of_a_decoder_is_off_only_while_it_is_captured(fails):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"use_cache": True})()

        def forward(self, x):
            assert not self.config.use_cache
            return x + 1 if not fails else x + (1 if x.sum() > 0 else 2)

    model = Decoder()
    try:
        capture(model, (torch.randn(2, 3),))
    except CaptureError:
        assert fails
    assert model.config.use_cache


class Backend:
    """Keeps what Dynamo hands over, and runs it as it is."""

    def __init__(self):
        self.programs = []

    def __call__(self, graph_module, inputs):
        self.programs.append(capture_dynamo(graph_module, inputs))
        return graph_module


def test_dynamo_graphs_keep_the_order_of_the_inputs():
    model, backend, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU()).requires_grad_(False), Backend(), torch.randn(3, 8)
    static = torch.zeros(3, 6)
    torch._dynamo.mark_static_address(static)

    def call(x, cache):
        return model(x) + cache

    torch.compile(call, backend=backend)(x, static)
    (program,) = backend.programs
    assert sorted(program.weights) == ["0.bias", "0.weight"]
    assert [n.meta[DYNAMO_INDEX] for n in program.placeholders] == list(range(len(program.placeholders)))
    assert [bool(n.meta.get(STATIC)) for n in program.placeholders if WEIGHT not in n.meta] == [False, True]
    assert torch.allclose(program(x, static)[0], model(x))


def test_breaks_are_recorded_with_their_place():
    backend = Backend()

    def call(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    torch.compile(call, backend=backend)(torch.randn(3))
    assert len(backend.programs) == 2
    assert any("test_capture.py" in line for program in backend.programs for line in program.breaks)


def test_caches_of_inner_configs_are_off_too():
    class Config:
        def __init__(self, **inner):
            self.use_cache = True
            vars(self).update(inner)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config(text_config=Config(decoder=Config()))
            self.generation_config = Config()

        def forward(self, x, use_cache=None):
            inner = self.config.text_config
            off = (self.config, inner, inner.decoder, self.generation_config)
            assert not use_cache and not any(config.use_cache for config in off)
            return x + 1

    model = Pair()
    capture(model, (torch.randn(2, 3),), {"use_cache": True})
    assert model.config.use_cache and model.config.text_config.decoder.use_cache and model.generation_config.use_cache


def test_inputs_bear_the_names_of_the_call():
    class Features(nn.Module):
        def forward(self, features, *more, scale):
            return features["ids"] * more[0] * scale

    program = capture(Features(), ({"ids": torch.ones(2)}, torch.ones(2)), {"scale": 3})
    assert [n.name for n in program.inputs] == ["features_ids", "argument_2"]
    assert program(torch.ones(2), torch.full((2,), 5.0))[0].tolist() == [15, 15]


def test_a_graph_of_constants_takes_no_tensor():
    found = []

    def backend(graph_module, inputs):
        found.append(has_tensor_input(graph_module))
        if not found[-1]:
            with pytest.raises(CaptureError, match="no tensor input"):
                capture_dynamo(graph_module, inputs)
        return graph_module

    torch.compile(lambda: torch.arange(4) * 2, backend=backend)()
    torch.compile(lambda x: x * 2, backend=backend)(torch.ones(2))
    assert found == [False, True]


def test_lines_of_code_are_not_noted_and_the_callers_setting_comes_back(monkeypatch):
    for setting in (False, True):
        monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", setting)
        program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
        assert torch.fx.config.do_not_emit_stack_traces is setting
        assert not any(node.stack_trace for node in program.graph.nodes)
