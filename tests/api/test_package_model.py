"""A model in one file: what cannot be packaged is refused before any work, with the reason, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from tiny_text_models import SIZES, quantized_llama
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.api import package_model
from qcompile.backend import cached_graph, dynamo
from qcompile.recipe.rule import RecipeError


@pytest.fixture
def no_work(monkeypatch):
    """Neither captures nor compiles."""
    for module, name in (
        (cached_graph, "capture_prompt"),
        (cached_graph, "capture_step"),
        (dynamo, "compile_program"),
        (package_model, "compile_ahead"),
    ):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it began to work"))


def mlp():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).eval()


@pytest.mark.parametrize("name", ["model.pt", "model", "folder.pt2"])
def test_a_name_that_is_no_package(name, tmp_path, no_work):
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match=r"no name for a package. Fix: name a file that ends in \.pt2"):
        qcompile.package(mlp(), tmp_path / name, example=torch.randn(2, 64))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


def test_a_place_that_cannot_be_written(tmp_path, no_work):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        qcompile.package(mlp(), tmp_path / "file" / "m.pt2", example=torch.randn(2, 64))


def test_bad_options(tmp_path, no_work):
    with pytest.raises(RecipeError, match="unknown option 'speed'"):
        qcompile.package(mlp(), tmp_path / "m.pt2", speed=3)
    with pytest.raises(RecipeError, match="needs calibration data"):
        qcompile.package(mlp(), tmp_path / "m.pt2", "w4a16-gptq")


def test_a_model_that_cannot_be_packaged(tmp_path, no_work):
    path = tmp_path / "m.pt2"
    with pytest.raises(RecipeError, match=r"training mode. Fix: model.eval\(\)"):
        qcompile.package(mlp().train(), path)
    with pytest.raises(RecipeError, match="brings no example input"):
        qcompile.package(mlp(), path)
    with pytest.raises(RecipeError, match="meta device"):
        qcompile.package(mlp().to("meta"), path, example=torch.randn(2, 64))

    class Fixed(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.past_key_values = None
            return found

    with pytest.raises(RecipeError, match="no cache of keys and values. Fix: give example="):
        qcompile.package(Fixed(LlamaConfig(**SIZES)).eval(), path)
    quantized = quantized_llama("kv8")
    with pytest.raises(
        RecipeError, match="has a quantized key/value cache, or a prefix .* Fix: quantize the float model"
    ):
        qcompile.package(quantized, path)
    assert not list(tmp_path.iterdir())


def test_a_failure_of_the_compiler_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(package_model, "compile_ahead", lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler")))
    with pytest.raises(RuntimeError, match="no compiler"):
        qcompile.package(mlp(), tmp_path / "m.pt2", example=torch.randn(2, 64))
    assert not list(tmp_path.iterdir())


def test_both_graphs_of_a_text_model_keep_the_same_sites_float(tmp_path, monkeypatch):
    """A site that a prompt read in float and a token quantized would be in the file twice."""
    seen = []
    monkeypatch.setattr(package_model, "compile_ahead", lambda lowered, settings: seen.append((lowered, settings)))
    monkeypatch.setattr(package_model, "write_archive", lambda path, graphs, files, _: seen.append(files) or 5)
    lower, rows = dynamo.compile_program, []
    record = lambda program, inputs, options: rows.append(options.rows) or lower(program, inputs, options)  # noqa: E731
    monkeypatch.setattr(dynamo, "compile_program", record)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=90)).eval()
    report = qcompile.package(model, tmp_path / "m.pt2", "w4a16", verify=False)
    assert rows == [1, 1]
    (prompt, of_prompt), (step, of_step), files = seen
    assert report.metrics["package bytes"] == 5 and set(files) == {"config.json", "generation_config.json"}
    assert of_prompt["aot_inductor.metadata"] == of_step["aot_inductor.metadata"]
    assert of_step["aot_inductor.metadata"] == {"cache": "4 16 4 16", "cache_dtype": "float32"}
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in (prompt, step)]
    kinds = [sorted(target for target in found if "_linear" in target) for found in targets]
    assert kinds[0] == kinds[1] != []
    packed = [{name for name, t in graph.weights.items() if t.dtype == torch.uint8} for graph in (prompt, step)]
    assert packed[0] == packed[1] != set()
    assert all(torch.equal(prompt.weights[name], step.weights[name]) for name in packed[0])


def test_an_example_packages_the_forward_of_a_text_model(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(package_model, "compile_ahead", lambda lowered, _: lowered)
    monkeypatch.setattr(package_model, "write_archive", lambda *arguments: written.extend(arguments) or 5)
    model = quantized_llama()
    qcompile.package(model, tmp_path / "m.pt2", example={"input_ids": torch.ones(1, 4, dtype=torch.long)})
    _, graphs, files, description = written
    assert description["kind"] == "module" and "config.json" in files
    assert description["outputs"] == {"kind": "names", "names": ["logits"]}
    (ids,) = description["inputs"]
    assert ids["path"] == "input_ids" and all(isinstance(size, str) for size in ids["sizes"])
    ids = torch.randint(90, (3, 7))
    with torch.no_grad():
        assert torch.allclose(graphs["module"](ids)[0], model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "encoder"])
def test_any_module_is_one_graph(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "mlp":
        model, example = mlp(), {"input": torch.randn(1, 64)}
        calls = [{"input": torch.randn(rows, 64)} for rows in (1, 2, 33)]
    else:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        model, example = BertModel(BertConfig(**sizes, vocab_size=90)).eval(), None
        calls = [{"input_ids": torch.randint(1, 90, size)} for size in ((1, 5), (3, 9))]
    qcompile.quantize(model, "w4a16", example=example, progress=False, verify=False)
    report = qcompile.package(model, tmp_path / "m.pt2", example=example)
    assert report.metrics["package bytes"] == (tmp_path / "m.pt2").stat().st_size
    assert all(site.kernel for site in report.sites)
    module = qcompile.load_package(tmp_path / "m.pt2")
    for call in calls:
        with torch.no_grad():
            want, got = model(**call), module(**call)
        want, got = (want, got) if kind == "mlp" else (want.last_hidden_state, got.last_hidden_state)
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4)
