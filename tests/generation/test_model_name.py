"""Names of models that lead nowhere are refused at once, and never called a bad id."""

from __future__ import annotations

import io
import time

import pytest

from qcompile.generation import model_name
from qcompile.generation.model_name import ModelNotFound, require_model


@pytest.fixture
def hub(monkeypatch):
    """A hub that has nothing; returns how often it was tried."""
    tried = []
    monkeypatch.setattr(model_name, "is_reachable", lambda: tried.append(1) or False)
    monkeypatch.setattr(model_name, "is_cached", lambda name: name == "owner/cached")
    monkeypatch.setattr(model_name, "_stay_offline", lambda: tried.append("offline"))
    return tried


@pytest.mark.parametrize(
    "name",
    ["/models/Llama [q4_k] v2", "/models/[/tmp]", "no/such/model", "./model", "../model", "a b", "[red]", "~/model",
     "model.gguf", "a/model.gguf", "C:\\models\\a", "x" * 300, "nul\0", "models/", "-x"],
)  # fmt: skip
def test_what_can_only_be_a_path_is_not_found(name, hub):
    with pytest.raises(ModelNotFound) as refusal:
        require_model(name)
    assert f"{name} is not found: there is no such file or folder" in str(refusal.value) and not hub


def test_an_empty_name_is_no_folder(hub):
    for name in ("", "  "):
        with pytest.raises(ModelNotFound, match="the name of the model is empty"):
            require_model(name)


def test_what_exists_is_left_to_the_loader(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[q4_k]").mkdir()
    for name in (str(tmp_path), ".", "[q4_k]"):
        require_model(name)
    assert not hub


def test_a_hub_id_needs_the_hub_or_its_cache(hub, monkeypatch):
    for name in ("gpt2", "owner/name", "Owner/name-1.5_b"):
        with pytest.raises(
            ModelNotFound, match=f"{name} is not found: there is no such folder, and the hub is offline"
        ):
            require_model(name)
    require_model("owner/cached")
    assert hub[-1] == "offline", "what the cache has is read without waiting for the hub"
    monkeypatch.setattr(model_name, "is_reachable", lambda: True)
    require_model("owner/name")


def test_the_hub_is_waited_for_seconds_only(monkeypatch):
    for name in model_name._OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(model_name, "_SECONDS", 0.1)
    monkeypatch.setattr(model_name.urllib.request, "urlopen", lambda *_, **__: (time.sleep(1), io.BytesIO())[1])
    start = time.perf_counter()
    assert not model_name.is_reachable() and time.perf_counter() - start < 0.9

    def refuse(*_, **__):
        raise model_name.urllib.error.HTTPError("u", 401, "no", None, None)

    monkeypatch.setattr(model_name.urllib.request, "urlopen", refuse)
    assert model_name.is_reachable(), "an answer, whatever it says"
    monkeypatch.setenv("HF_HUB_OFFLINE", "True")
    assert not model_name.is_reachable()
