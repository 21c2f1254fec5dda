"""Tests of models on the pretend device, which tests/api/test_device_placement.py runs in a process of their own.

PyTorch knows the device from then on, and so do DataParallel and whatever else asks for accelerators.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from streamed_models import (
    content,
    finished_sites,
    in_memory,
    llama_folder,
    mixture_folder,
    store_all,
    streamed,
    token_batches,
)
from zoo import build, example

import pretend_device
import qcompile
from qcompile.api import quantize_folder
from qcompile.api.device_placement import device_of, move_to_device
from qcompile.generation.pretrained import load_in_parts
from qcompile.memory.stored_tensor import StoredTensor


@pytest.fixture(scope="module")
def device():
    return pretend_device.register()


def close(found, want):
    """Sums may be in another order: scales to rounding, codes but for ties."""
    left = [name for name, tensor in found.items() if tensor.device.type != "pretend"]
    assert found and not left, f"{left} were left behind"
    assert not want or found.keys() == want.keys()
    for name, tensor in want.items():
        ours = found[name]
        if tensor.is_floating_point():
            assert torch.allclose(ours.cpu().float(), tensor.float(), rtol=1e-4, atol=1e-6), name
        else:
            assert (ours.cpu() != tensor).float().mean() < 0.01, name


def test_the_device_refuses_what_a_gpu_refuses(device):
    here, there = torch.randn(3, 4), torch.randn(3, 4).to(device)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        torch.linalg.cholesky_ex(torch.mm(there, here.t()))
    assert torch.equal((there @ there.t()).cpu(), there.cpu() @ there.cpu().t())


RECIPES = ["int8-smooth", "int8-rotated", "w4a16-awq", "w4a16-gptq", "w4a8-dgq", "w4a8kv4-qoq", "w4a4-rrs"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_on_a_device_has_the_codes_of_the_host(device, recipe):
    float_model, host, there = build("llama"), build("llama"), build("llama").to(device)
    for model in (host, there):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            qcompile.quantize(model, recipe, [example("llama")], progress=False)  # batches on the CPU are moved
    # A clip that is as good as another one may win there; GPTQ then makes up for other errors, in all layers behind.
    searches = recipe == "w4a8kv4-qoq"
    close(there.state_dict(), {} if searches else host.state_dict())
    with torch.no_grad():
        exact, want = (model(**example("llama")).logits for model in (float_model, host))
        found = there(**{name: tensor.to(device) for name, tensor in example("llama").items()}).logits
    assert found.device.type == "pretend"
    assert (found.cpu() - want).norm() <= (0.5 if searches else 0.01) * (want - exact).norm()


@pytest.mark.parametrize("recipe", ["w4a16", "w4a16-gptq", "int8-smooth"])
@pytest.mark.parametrize("model", [llama_folder, mixture_folder])
def test_a_folder_is_computed_on_a_device(device, tmp_path, monkeypatch, model, recipe):
    store_all(monkeypatch)
    source = model(tmp_path / "float")
    streamed(source, tmp_path / "there", recipe, token_batches(), device="pretend")
    in_memory(source, tmp_path / "here", recipe, token_batches())
    here, there = (qcompile.load(tmp_path / name) for name in ("here", "there"))
    close(there.to(device).state_dict(), here.state_dict())


def test_a_run_on_a_device_goes_on_where_it_was_killed(device, tmp_path, monkeypatch):
    store_all(monkeypatch)
    source = llama_folder(tmp_path / "float")
    want = streamed(source, tmp_path / "whole", "w4a16-gptq", token_batches(), device="pretend")
    add, count = quantize_folder.Workspace.begin, 0

    def begin(*args):
        finished = add(*args)
        kept = finished.add

        def failing(sites, solved):
            nonlocal count
            count += 1
            if count == 5:
                raise KeyboardInterrupt
            kept(sites, solved)
            finished.seconds_between = 0

        finished.add = failing
        return finished

    with monkeypatch.context() as patch:
        patch.setattr(quantize_folder.Workspace, "begin", begin)
        with pytest.raises(KeyboardInterrupt):
            streamed(source, tmp_path / "killed", "w4a16-gptq", token_batches(), device="pretend")
    assert len(finished_sites(tmp_path / "killed")) == 4
    found = streamed(source, tmp_path / "killed", "w4a16-gptq", token_batches(), device="pretend", resume=True)
    assert found == want == content(tmp_path / "whole")


def test_stored_tensors_move_without_a_read_and_tied_ones_stay_tied(device, tmp_path, monkeypatch):
    store_all(monkeypatch)
    model, _ = load_in_parts(llama_folder(tmp_path / "float", tie_word_embeddings=True))
    values = model.model.embed_tokens.weight.read()
    monkeypatch.setattr(StoredTensor, "read", lambda self: pytest.fail("was read"))
    assert move_to_device(model, "pretend") == device == device_of(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, StoredTensor)
    monkeypatch.undo()
    there = model.lm_head.weight.read()
    assert there.device == device and torch.equal(there.cpu(), values)
