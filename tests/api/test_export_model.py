"""`qcompile.export`: transformers reads the folder and computes the same; a folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from served_models import FLOAT_LOGITS, decoder, ids, quantized, recipe

import qcompile
from qcompile.api import export_model
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.writers.export_refusals import ExportError, quantized_linears
from qcompile.passes import HQQ, FoldNorm, Fuse, LoRC, OnlineHadamard, Quantize, QuantizeKV, Rotate, Untie
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError, Rule


def read(folder, dtype=torch.float32, *, dequantize=False):
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def difference(model, folder, **options):
    with torch.no_grad():
        return float((read(folder, **options)(ids()).logits - model(ids()).logits).abs().max())


@pytest.mark.parametrize(
    "weight, act",
    [
        ("int4/group128", None), ("int4/group32", None), ("int4/row", None), ("int8/row", None),
        ("int4/group128/bf16", None), ("int4/group128", "fp8/row"), ("fp8/row", "fp8/row"), ("fp8/tensor", "fp8/row"),
    ],
)  # fmt: skip
def test_transformers_computes_the_same_logits(tmp_path, weight, act):
    model = quantized(weight, act, clip=True)
    assert float((model(ids()).logits - decoder()(ids()).logits).abs().max()) > 0.05, "quantization changes them"
    report = qcompile.export(model, tmp_path / "out", progress=False)
    assert difference(model, tmp_path / "out") == 0.0
    assert report.passes[-1].notes == ["7 weights read back by compressed-tensors, equal bit for bit"]


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning")
@pytest.mark.parametrize(
    "weight", ["int4/group128/zero", "int3/group64/zero", "int2/group32/zero", "int8/group128/zero"]
)
def test_zero_points_are_read_with_dequantize(tmp_path, weight):
    model = quantized(weight)
    qcompile.export(model, tmp_path / "out", progress=False)
    assert difference(model, tmp_path / "out", dequantize=True) == 0.0
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # of compressed-tensors 0.20: see the card
        read(tmp_path / "out")


def test_float_logits_stay_tied(tmp_path):
    model = quantized("int4/group32", tied=True)
    qcompile.export(model, tmp_path / "out", progress=False)
    again = read(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight and difference(model, tmp_path / "out") == 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_mixed_formats_and_logits_of_their_own(tmp_path, tied):
    rules = (Rule("*.down_proj.*", weight="int8/group128"), Rule("lm_head.*", weight="int8/row"))
    model = quantized("int4/group32", rules=rules, tied=tied)
    qcompile.export(model, tmp_path / "out", progress=False)
    assert difference(model, tmp_path / "out") == 0.0
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert [len(group["targets"]) for group in groups.values()] == [1, 1, 6]


def test_folded_rotations_are_ordinary_weights(tmp_path):
    passes = (Untie(), FoldNorm(), Rotate(), Quantize("int4/group32", None, keep_lm_head=True), Fuse())
    model = decoder(tied=True)
    qcompile.quantize(model, Recipe("r", passes), progress=False)
    qcompile.export(model, tmp_path / "out", progress=False)
    assert difference(model, tmp_path / "out") == 0.0


@pytest.mark.parametrize(
    "weight, act",
    [("int4/group128/bf16", None), ("int8/row/bf16", "int8/row"), ("fp8/row/bf16", "fp8/row"), ("int8/row/bf16", None)],
)
def test_a_bfloat16_model_is_read_with_the_same_weights(tmp_path, weight, act):
    model = quantized(weight, act, torch.bfloat16)
    qcompile.export(model, tmp_path / "out", progress=False)
    again = read(tmp_path / "out", torch.bfloat16)
    again(ids())  # decompresses
    for path, module in model.named_modules():
        if isinstance(module, qcompile.QuantLinear):
            assert torch.equal(again.get_submodule(path).weight, module.weight.bfloat16()), path


def test_int8_activations_have_the_same_weights_and_close_logits(tmp_path):
    model = quantized("int8", "int8")
    qcompile.export(model, tmp_path / "out", progress=False)
    assert 0 < difference(model, tmp_path / "out") < 0.5  # max / 127.5 instead of max / 127 for activations


def test_five_shards_and_a_recipe(tmp_path):
    model, batches = decoder(torch.bfloat16), [ids()]
    report = qcompile.export(model, tmp_path / "out", "serve-w4a16", batches, to="vllm", shard=20_000, progress=False)
    assert not any(isinstance(module, qcompile.QuantLinear) for module in model.modules()), "a copy is quantized"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 5
    assert sum(site.quantized for site in report.sites) == 7
    again = read(tmp_path / "out", torch.bfloat16)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    copied = decoder(torch.bfloat16)
    qcompile.quantize(copied, "serve-w4a16", batches, progress=False)
    again(ids())
    for path, module in copied.named_modules():
        if isinstance(module, qcompile.QuantLinear):
            assert torch.equal(again.get_submodule(path).weight, module.weight.bfloat16())


def test_the_folder_has_what_serves_it(tmp_path):
    class Words:
        def save_pretrained(self, folder):
            open(os.path.join(folder, "tokenizer.json"), "w").close()

    qcompile.export(quantized("int4/group32"), tmp_path / "out", tokenizer=Words(), progress=False)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "qcompile-report.json",
        "tokenizer.json",
    }  # fmt: skip
    assert "recipe served: 7 of 7 sites" in (tmp_path / "out/README.md").read_text()


def test_refusals_come_before_work_and_leave_nothing(tmp_path, monkeypatch):
    quantize = []
    monkeypatch.setattr(export_model, "quantize", lambda *a, **k: quantize.append(a))
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="a last group of 32 of 48 columns .*Fix: use groups of 128"):
        qcompile.export(decoder(), out, recipe("int4/group48"), progress=False)
    with pytest.raises(RecipeError, match="export to 'tensorrt' is unknown. Fix: use one of compressed-tensors"):
        qcompile.export(decoder(), out, recipe("int4/group32"), to="tensorrt", progress=False)
    with pytest.raises(ExportError, match="nothing for compressed-tensors to say"):
        qcompile.export(decoder(), out, progress=False)
    with pytest.raises(ExportError, match="Linear is no model of transformers"):
        qcompile.export(torch.nn.Linear(32, 32), out, recipe("int4/group32"), progress=False)
    for shard in ("large", "0", -1, "5 apples"):
        with pytest.raises(ExportError, match="no size of a file. Fix: give bytes, or a text as '5GB'"):
            qcompile.export(decoder(), out, recipe("int4/group32"), shard=shard, progress=False)
    with pytest.raises(ExportError, match="export to onnx takes no template"):
        qcompile.export(decoder(), out, template="a.gguf", to="onnx", progress=False)
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        qcompile.export(decoder(), out, recipe("int4/group32"), progress=False)
    assert not quantize and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_proof_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(*arguments):
        raise ExportError("differs")

    monkeypatch.setattr(export_model, "prove_compressed", fails)
    with pytest.raises(ExportError, match="differs"):
        qcompile.export(quantized("int4/group32"), tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_report_says_that_nothing_was_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(export_model, "can_reopen", lambda: False)
    report = qcompile.export(quantized("int4/group32"), tmp_path / "out", progress=False)
    assert "not read back: compressed-tensors is not installed" in report.passes[-1].notes[0]


def test_onnx_is_the_exporter_of_onnx(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(export_model, "export_onnx", lambda *a, **k: calls.append((a, k)))
    qcompile.export("model", "folder", "int8", to="onnx", tokenizer="t")
    ((arguments, options),) = calls
    assert arguments == ("model", "folder", "int8", None) and options["tokenizer"] == "t"


KILLED = """
import sys
from qcompile.api import export_model
from served_models import quantized

def stops(*arguments):
    print("written", flush=True)
    sys.stdin.read()

export_model.prove_compressed = stops
export_model.export(quantized("int4/group32"), sys.argv[1], progress=False)
"""


def test_an_export_that_is_killed_leaves_no_folder(tmp_path):
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    qcompile.export(
        quantized("int4/group32", rules=FLOAT_LOGITS), tmp_path / "out", progress=False
    )  # and may be redone
    assert (tmp_path / "out/config.json").is_file()


EDGE = {"lm_head": "int8/row", "lm_head_act": "int8/row/zero"}


@pytest.mark.parametrize(
    "passes, words",
    [
        (
            (Quantize("fp4/group32", "int8/row/zero"), Fuse()),
            "q_proj: weights in fp4/group32, which executorch",
        ),
        ((Quantize("int4/group32", None), Fuse()), "q_proj: activations in float"),
        ((Quantize("int4/group48/bf16", "int8/row/zero"), Fuse()), r"q_proj: groups of 48 columns \(K = 128\)"),
        ((Quantize("int8", "int8/row/zero"), Fuse()), "lm_head: activations in float .*of logits by lm_head_act"),
        ((HQQ("int4/group64/floatzero", None), Fuse()), "weights in int4/group64/floatzero, which have zero points"),
        ((OnlineHadamard(), Quantize("int8", "int8/row/zero", **EDGE), Fuse()), "an online Hadamard transform"),
        ((Quantize("int8", "int8/row/zero", **EDGE), LoRC(4), Fuse()), "a low-rank correction beside weights"),
        ((QuantizeKV(8), Quantize("int8", "int8/row/zero", **EDGE), Fuse()), "a key/value cache of ours"),
    ],
)
def test_what_executorch_cannot_say_is_refused_before_work(tmp_path, passes, words, monkeypatch):
    monkeypatch.setattr(export_model, "quantize", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(export_model, "require_executorch", lambda: 1 / 0)  # so it needs no package
    with pytest.raises(ExportError, match=words):
        qcompile.export(decoder(), tmp_path / "out", Recipe("edge", passes), to="executorch", progress=False)
    assert not list(tmp_path.iterdir())


def test_executorch_gets_the_quantized_model_its_call_and_a_file(tmp_path, monkeypatch):
    written = []

    def write(model, call, path):
        written.append((model, call, path.name))
        path.write_bytes(b"program")
        return ["compared"]

    class Words:
        def save_pretrained(self, folder):
            open(os.path.join(folder, "tokenizer.json"), "w").close()

    monkeypatch.setattr(export_model, "require_executorch", lambda: None)
    monkeypatch.setattr(export_model, "write_edge_program", write)
    passes = (Quantize("int4/group32/bf16", "int8/row/zero", **EDGE), Fuse())
    model, made = decoder(), Recipe("edge", passes)
    options = {"to": "executorch", "length": 16, "tokenizer": Words(), "progress": False}
    report = qcompile.export(model, tmp_path / "out", made, **options)
    (quantized_copy, call, name), *_ = written
    assert len(quantized_linears(quantized_copy)) == 8 and call.tokens == 16 and name == "model.pte"
    assert not quantized_linears(model) and report.passes[-1].notes == ["compared"]
    names = {"README.md", "model.pte", "qcompile-report.json", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert 'load_program("out/model.pte")' in (tmp_path / "out/README.md").read_text()
    (tmp_path / "alone").mkdir()
    qcompile.export(model, tmp_path / "alone/model.pte", made, **options)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["model.pte"], "no tokenizer beside a file"
    qcompile.export(model, tmp_path / "one.pte", made, **options)
    assert (tmp_path / "one.pte").read_bytes() == b"program"
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "out", "one.pte"}
    (tmp_path / "dir.pte").mkdir()
    with pytest.raises(ExportError, match="is a folder. Fix: name a file in it, or a folder without .pte"):
        qcompile.export(model, tmp_path / "dir.pte", made, **options)


def test_a_module_that_is_none_of_transformers_goes_to_executorch_by_its_example(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(export_model, "require_executorch", lambda: None)
    monkeypatch.setattr(export_model, "write_edge_program", lambda *arguments: written.append(arguments) or [])
    net, x = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8)).eval(), torch.randn(2, 64)
    made = Recipe("edge", (Quantize("int8", "int8/row/zero", **EDGE), Fuse()))
    qcompile.export(net, tmp_path / "out", made, to="executorch", example=x, progress=False)
    ((model, call, _),) = written
    assert len(quantized_linears(model)) == 2 and torch.equal(call.checks[0][0], x)
    with pytest.raises(ExportError, match="Sequential is no causal LM of transformers. Fix: give example="):
        qcompile.export(net, tmp_path / "b", made, to="executorch", progress=False)
    with pytest.raises(ExportError, match="export to compressed-tensors takes no length, and 8 was given"):
        qcompile.export(decoder(), tmp_path / "b", made, length=8, progress=False)
