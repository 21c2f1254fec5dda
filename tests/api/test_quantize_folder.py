"""A folder quantized in parts is the folder of the model in memory, byte for byte; a killed run goes on."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from served_models import decoder, write_template
from streamed_models import (
    content,
    finished_sites,
    in_memory,
    llama_folder,
    log_lines,
    mixture_folder,
    store_all,
    streamed,
    token_batches,
    whole_blocks,
)

import qcompile
from qcompile.api.memory_plan import MemoryPlan
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.checkpoint import stored_files
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.finished_folder import FinishedFolder
from qcompile.generation import pretrained
from qcompile.generation.model_name import ModelNotFound
from qcompile.generation.pretrained import load_in_parts, load_pretrained
from qcompile.memory import spilled_weights
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.passes.weights import round_to_nearest, sequential

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def all_stored(monkeypatch):
    store_all(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by name; not to be changed."""
    place = tmp_path_factory.mktemp("models")
    make = {
        "plain": functools.partial(llama_folder, num_hidden_layers=1),
        "two layers": llama_folder,
        "tied": functools.partial(llama_folder, num_hidden_layers=1, tie_word_embeddings=True),
        "bfloat16": functools.partial(llama_folder, num_hidden_layers=1, dtype=torch.bfloat16),
        "mixture": mixture_folder,
    }
    return functools.cache(lambda name: make[name](place / name))


SLOW = pytest.mark.slow
CASES = [
    ("plain", "w4a16-gptq"),
    ("tied", "int8-smooth"),
    ("mixture", "w4a16"),
    *[pytest.param("plain", recipe, marks=SLOW) for recipe in (
        "w4a16", "w4a16-hqq", "w4a16-rotated-gptq", "int8-smooth", "w4a16-lorc", "w4a16-gptaq", "w4a8-dgq",
        "w4a16-awq", "int4-cpu", "kv4-smooth", "float",
    )],
    *[pytest.param("two layers", recipe, marks=SLOW) for recipe in ("w4a8kv4-qoq", "w4a16-gptq")],
    *[pytest.param("tied", recipe, marks=SLOW) for recipe in ("w4a16", "w4a16-gptq", "w4a16-rotated-gptq")],
    *[pytest.param("bfloat16", recipe, marks=SLOW) for recipe in ("w4a16", "w4a16-gptq", "w4a8kv4-qoq")],
    *[pytest.param("mixture", recipe, marks=SLOW) for recipe in ("w4a16-gptq", "w4a16-gptaq", "int8-smooth")],
]  # fmt: skip


@pytest.mark.parametrize("model, recipe", CASES)
def test_streamed_is_in_memory_byte_for_byte(models, tmp_path, model, recipe):
    want = in_memory(models(model), tmp_path / "whole", recipe, token_batches())
    found = streamed(models(model), tmp_path / "parts", recipe, token_batches())
    assert found.keys() == want.keys()
    assert [name for name in want if found[name] != want[name]] == []
    assert sorted(tmp_path.iterdir()) == [tmp_path / "parts", tmp_path / "whole"], "nothing else stays"


def test_a_folder_by_its_name(models, tmp_path):
    """`qcompile.quantize` of a path; what it writes is read by `load` and computes what the report says."""
    out = tmp_path / "q"
    report = qcompile.quantize(str(models("plain")), "int8", token_batches(), out=str(out), progress=False)
    assert len(report.sites) == 8 and report.peak_bytes > 0
    model, ids = qcompile.load(out), token_batches()[0]
    float_model, _ = load_pretrained(str(models("plain")), None)
    with torch.no_grad():
        got, want = model(ids).logits, float_model(ids).logits
    assert 0 < float((got - want).norm() / want.norm()) < 0.05
    assert not any(isinstance(tensor, StoredTensor) for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    "recipe, dtype", [("w4a16", None), ("w4a16-gptq", torch.bfloat16), ("w4a16-rotated", torch.float32)]
)
def test_a_gguf_file_is_read_in_parts(tmp_path, monkeypatch, recipe, dtype):
    file = write_template(decoder(), tmp_path / "m.gguf")
    monkeypatch.setattr(pretrained, "_tokenizer", lambda *_, **__: None)  # the file has none, and whole it needs one
    got = streamed(file, tmp_path / "parts", recipe, token_batches(), dtype=dtype)
    assert got == in_memory(file, tmp_path / "whole", recipe, token_batches(), dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "parts", "whole"], "nothing else stays"
    model, tokenizer = load_in_parts(file, dtype)
    assert tokenizer is None and all(isinstance(weight.data, StoredTensor) for weight in model.parameters())


def test_a_killed_run_on_a_gguf_file_goes_on(tmp_path, monkeypatch):
    file, out = write_template(decoder(), tmp_path / "m.gguf"), tmp_path / "q"
    want = streamed(file, tmp_path / "want", "w4a16-gptq", token_batches())
    killed(monkeypatch, 2, file, out, "w4a16-gptq")
    solved = solved_now(monkeypatch)
    assert streamed(file, out, "w4a16-gptq", token_batches(), resume=True) == want
    assert len(solved) == 2, "of four groups"
    killed(monkeypatch, 2, file, tmp_path / "r", "w4a16-gptq")
    write_template(decoder(seed=1), file)
    with pytest.raises(CheckpointError, match="of another run: its model is "):
        streamed(file, tmp_path / "r", "w4a16-gptq", token_batches(), resume=True)


def test_a_gguf_file_becomes_another_in_parts(tmp_path, monkeypatch):
    """The bytes of a model in memory that is exported, also where a killed run goes on."""
    monkeypatch.setattr(pretrained, "_tokenizer", lambda *_, **__: None)
    file, out = write_template(decoder(), tmp_path / "m.gguf"), tmp_path / "parts.gguf"
    model, _ = load_pretrained(str(file), torch.float32)
    given = ("gguf-q4_k", token_batches())
    qcompile.export(model, tmp_path / "whole.gguf", *given, to="gguf", template=file, progress=False)
    killed(monkeypatch, 2, file, out, "gguf-q4_k")
    solved = solved_now(monkeypatch)
    report = qcompile.quantize(str(file), *given, out=out, resume=True, progress=False)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes() and len(solved) == 2, "of four groups"
    assert report.passes[-1].name == "export to gguf" and len(report.passes[-1].done) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "parts.gguf", "whole.gguf"]


def test_a_gguf_file_that_cannot_be_made_is_refused_before_work(models, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_tokenizer", lambda *_, **__: None)
    file = write_template(decoder(), tmp_path / "m.gguf")
    cases = [
        (file, file, "gguf-q8_0", "m.gguf exists and is not empty. Fix: choose another"),
        (models("plain"), tmp_path / "o.gguf", "gguf-q8_0", "o.gguf is made after a GGUF file, and .* is none. Fix:"),
        (file, tmp_path / "o.gguf", "int8", "q_proj: activations in int8/row .* gguf cannot say. Fix:"),
    ]
    for source, out, recipe, words in cases:
        with pytest.raises(ValueError, match=words):
            qcompile.quantize(str(source), recipe, out=out, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_log_comes_along(models, tmp_path):
    streamed(models("plain"), tmp_path / "q", "w4a16-gptq", token_batches())
    lines = log_lines(tmp_path / "q")
    sites = [site for line in lines for site in line["sites"]]
    assert len(lines) == 4 and len(set(sites)) == len(sites) == 7, "the logits are rounded to nearest"
    assert all(0 <= line["damage"][1] < line["damage"][0] < 1 for line in lines)


def test_out_goes_with_a_folder(models, tmp_path):
    with pytest.raises(ValueError, match="is a folder, and out= names none to write. Fix: quantize.*out="):
        qcompile.quantize(models("plain"), "int8")
    for wrong in ({"out": tmp_path / "x"}, {"resume": True}):
        with pytest.raises(ValueError, match="out=.* and resume= go with a folder, the model is in memory. Fix: "):
            qcompile.quantize(torch.nn.Linear(4, 4), "int8", [torch.ones(1, 4)], **wrong)


class Killed(BaseException):
    """What ends a run in the middle, as a signal does."""


def killed(monkeypatch, groups, source, out, recipe, **options):
    """A run that ends when `groups` of sites are finished, and it is about to keep another one."""
    real = FinishedFolder.add

    def add(folder, sites, solved):
        if len(finished_sites(out)) == groups:
            raise Killed
        real(folder, sites, solved)

    with monkeypatch.context() as patch:
        patch.setattr(FinishedFolder, "add", add)
        with pytest.raises(Killed):
            streamed(source, out, recipe, token_batches(), **options)
    assert not out.exists() and len(finished_sites(out)) == groups


def solved_now(monkeypatch):
    """The first site of every group that is solved from here on."""
    solved = []
    for module, name in ((sequential, "hessian_of"), (round_to_nearest, "_solve")):
        real = getattr(module, name)

        def counted(first, second, *rest, real=real):
            solved.append(getattr(second, "site", second).name)
            return real(first, second, *rest)

        monkeypatch.setattr(module, name, counted)
    return solved


@pytest.mark.parametrize("recipe, groups, kills", [("w4a16-gptq", 4, (1, 3)), ("w4a16", 8, (0, 5))])
def test_a_killed_run_goes_on(models, tmp_path, monkeypatch, recipe, groups, kills):
    source, out = models("plain"), tmp_path / "q"
    want = streamed(source, tmp_path / "want", recipe, token_batches())
    for number, count in enumerate(kills):
        killed(monkeypatch, count, source, out, recipe, resume=number > 0)
    (out.with_name("q.unfinished") / "sites" / "half.partial").write_bytes(b"half of a file")
    solved = solved_now(monkeypatch)
    assert streamed(source, out, recipe, token_batches(), resume=True) == want
    assert len(solved) == groups - kills[-1], "what was finished is not solved again"
    assert len(log_lines(out)) == groups and sorted(tmp_path.iterdir()) == [out, tmp_path / "want"]


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a8kv4-qoq"])
def test_a_resumed_run_computes_no_layer_again(models, tmp_path, monkeypatch, recipe):
    source, out = models("two layers"), tmp_path / "q"
    want = streamed(source, tmp_path / "want", recipe, token_batches())
    monkeypatch.setattr(FinishedFolder, "seconds_between", 0.0)
    monkeypatch.setattr(FinishedFolder, "_keeping", 0.0, raising=False)
    killed(monkeypatch, 6, source, out, recipe)
    computed, compute, restored, restore = [], LayerwiseRun._compute, [], LayerwiseRun.restore

    def counted(run, node, values):
        computed.append((run, node.name))
        return compute(run, node, values)

    monkeypatch.setattr(LayerwiseRun, "_compute", counted)
    monkeypatch.setattr(
        LayerwiseRun, "restore", lambda run, state: restored.append((run, state)) or restore(run, state)
    )
    assert streamed(source, out, recipe, token_batches(), resume=True) == want
    ((run, state),) = restored
    names = {name for of, name in computed if of is run}
    assert len(state.done) > 60 and names and not names & set(state.done)


def test_a_site_whose_file_was_removed_is_solved_again(models, tmp_path, monkeypatch):
    source, out = models("two layers"), tmp_path / "q"
    want = streamed(source, tmp_path / "want", "w4a16-gptq", token_batches())
    monkeypatch.setattr(FinishedFolder, "seconds_between", 0.0)
    killed(monkeypatch, 6, source, out, "w4a16-gptq")
    finished_sites(out)[0].unlink()  # the values that were kept stand behind it
    restored = []
    monkeypatch.setattr(LayerwiseRun, "restore", lambda run, state: restored.append(state))
    assert streamed(source, out, "w4a16-gptq", token_batches(), resume=True) == want and not restored


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "int8-smooth"])
def test_values_in_files_change_nothing(models, tmp_path, monkeypatch, recipe):
    want = streamed(models("plain"), tmp_path / "want", recipe, token_batches())
    spilled, real = [], spilled_weights.SpillFolder.spill
    monkeypatch.setattr(MemoryPlan, "within", lambda plan, limit: dataclasses.replace(plan, offloads=True))
    monkeypatch.setattr(spilled_weights.SpillFolder, "spill", lambda own, t: spilled.append(t.shape) or real(own, t))
    assert streamed(models("plain"), tmp_path / "q", recipe, token_batches(), memory="1GB") == want
    assert torch.Size([1, 24, 64]) in spilled, "the residual stream of a batch"


def test_only_the_same_run_goes_on(models, tmp_path, monkeypatch):
    """Of the same recipe and files, when it is asked for; a refusal removes nothing."""
    source, out = tmp_path / "m", tmp_path / "q"
    shutil.copytree(models("plain"), source)
    killed(monkeypatch, 2, source, out, "w4a16-gptq")

    def refused(text, recipe="w4a16-gptq", resume=True):
        with pytest.raises(CheckpointError, match=text):
            streamed(source, out, recipe, token_batches(), resume=resume)
        assert len(finished_sites(out)) == 2 and not out.exists()

    refused("holds what an earlier run finished. Fix: resume it", resume=False)
    refused("of another run: its recipe is ", recipe="int8")
    file = finished_sites(out)[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(f"{file.name} is damaged")
    file.write_bytes(whole)
    shard = sorted(source.glob("model-*.safetensors"))[0]
    save_file(load_file(shard), shard, {"format": "pt"})
    refused("of another run: its model is ")


def script(*arguments, ranks=0):
    """The command of a run in processes of its own, and its environment."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    return [*start, str(TESTS / "streamed_models.py"), *map(str, arguments)], environment


@SLOW
def test_a_process_that_was_killed_goes_on(models, tmp_path):
    source, out = models("two layers"), tmp_path / "q"
    want = streamed(source, tmp_path / "want", "w4a16-gptq", whole_blocks())
    for count in (1, 4):
        command, environment = script(source, out, "w4a16-gptq", "resume")
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(finished_sites(out)) < count:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not out.exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert content(out) == want and not out.with_name("q.unfinished").exists()


@SLOW
@pytest.mark.parametrize(
    "model, recipe",
    [
        ("two layers", "w4a16-gptq"),
        ("plain", "w4a16"),
        ("mixture", "w4a16-gptq"),
        ("plain", "int8-gptq"),
        ("two layers", "w4a16-awq"),
        ("plain", "w4a16-smooth"),
    ],
)
def test_ranks_write_what_one_process_writes(models, tmp_path, model, recipe):
    want = streamed(models(model), tmp_path / "want", recipe, whole_blocks())
    command, environment = script(models(model), tmp_path / "q", recipe, ranks=2)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert content(tmp_path / "q") == want
    ranks = {line["rank"] for line in log_lines(tmp_path / "q")}
    assert ranks == {0, 1} and not (tmp_path / "q.unfinished").exists()


@SLOW
def test_a_rank_that_fails_ends_the_run(models, tmp_path):
    command, environment = script(models("plain"), tmp_path / "q", "w4a16-gptq", "fails", ranks=2)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "this rank is broken" in done.stderr and not (tmp_path / "q").exists()


def harmed(models, tmp_path, harm):
    source = tmp_path / "m"
    shutil.copytree(models("plain"), source)
    harm(source, sorted(source.glob("model-*.safetensors"))[2])
    return source


def other_shape(source, shard):
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file({**tensors, name: torch.zeros(3, 5)}, shard, {"format": "pt"})


def other_format(source, shard):
    for file in source.glob("model*"):
        file.unlink()
    torch.save({"a": torch.ones(2)}, source / "pytorch_model.bin")


@pytest.mark.parametrize(
    "harm, text",
    [
        (lambda source, shard: shard.unlink(), "model-00003-of-.*safetensors"),
        (lambda source, shard: shard.write_bytes(shard.read_bytes()[:-9]), "model-00003-of-.*safetensors"),
        (lambda source, shard: save_file({"x": torch.ones(2)}, shard, {"format": "pt"}), "missing .* unknown "),
        (other_shape, "of another shape"),
        (other_format, "model.safetensors"),
        (lambda source, shard: shutil.rmtree(source), "m"),
    ],
)
def test_files_that_cannot_be_read_are_named_before_work(models, tmp_path, harm, text):
    source = harmed(models, tmp_path, harm)
    with pytest.raises(ValueError, match=text) as caught:
        streamed(source, tmp_path / "q", "w4a16-gptq", token_batches())
    assert isinstance(caught.value, ModelNotFound | CheckpointError) and "Fix: " in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "m"] == []


def test_what_is_not_to_be_done_is_refused_before_work(models, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="q"):
        streamed(models("plain"), tmp_path / "q", "int8", token_batches())
    assert (tmp_path / "q" / "mine").read_text() == "kept"
    with pytest.raises(ValueError, match="trains, which needs the whole model. Fix: qcompile.train"):
        streamed(models("plain"), tmp_path / "r", "q-galore", token_batches())
    with pytest.raises(ValueError, match="needs calibration data"):
        streamed(models("plain"), tmp_path / "r", "w4a16-gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_shard_that_goes_while_sites_are_solved_is_named(models, tmp_path, monkeypatch):
    source, out = tmp_path / "m", tmp_path / "q"
    shutil.copytree(models("plain"), source)
    places = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    shard, real = source / places["lm_head.weight"], FinishedFolder.add

    def add(folder, sites, solved):
        shard.unlink(missing_ok=True)
        real(folder, sites, solved)

    monkeypatch.setattr(FinishedFolder, "add", add)
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read any more .*Fix: restore it, and run again"):
        streamed(source, out, "w4a16", token_batches())
    assert not out.exists() and finished_sites(out)


def test_a_full_disk_leaves_what_was_finished(models, tmp_path, monkeypatch):
    """The message says how much does not fit; with more room the run goes on to the same bytes."""
    source, out = models("plain"), tmp_path / "q"
    want = streamed(source, tmp_path / "want", "w4a16-gptq", token_batches())
    real, room = spilled_weights.write_values, [6]

    def write(raw, tensor):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(raw, tensor)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"MB do not fit, \d+ MB are free") as caught:
        patch.setattr(spilled_weights, "write_values", write)
        streamed(source, out, "w4a16-gptq", token_batches())
    assert caught.value.errno == errno.ENOSPC and not out.exists() and finished_sites(out)
    assert streamed(source, out, "w4a16-gptq", token_batches(), resume=True) == want


@pytest.mark.parametrize("recipe", ["w4a16-gptq", pytest.param("w4a16", marks=SLOW)])
def test_more_layers_take_no_more_memory(tmp_path, monkeypatch, recipe):
    """Bytes of weights that were read and are alive, at any read, beside a model of other depth."""
    most = []
    for layers in (2, 5):
        source = llama_folder(tmp_path / f"{layers}", num_hidden_layers=layers)
        alive, peak = [], [0]

        def watched(read, alive=alive, peak=peak):
            def run(*arguments):
                values = read(*arguments)
                alive[:] = [(ref, size) for ref, size in alive if ref() is not None]
                alive.append((weakref.ref(values), values.nbytes))
                peak[0] = max(peak[0], sum(size for _, size in alive))
                return values

            return run

        with monkeypatch.context() as patch:
            patch.setattr(stored_files, "read_part", watched(stored_files.read_part))
            patch.setattr(spilled_weights, "read_values", watched(spilled_weights.read_values))
            model, tokenizer = load_pretrained(str(source), None, stream=True)
            streamed(source, tmp_path / f"q{layers}", recipe, token_batches(), model=model, tokenizer=tokenizer)
        large = {name: t for name, t in model.state_dict().items() if t.nbytes > 256}
        assert large and not [name for name, t in large.items() if not isinstance(t, StoredTensor)]
        most.append(peak[0])
    assert most[0] == most[1] > 0
