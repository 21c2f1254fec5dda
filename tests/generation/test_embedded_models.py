"""The embedded models are files of packages; a package that is missing is named with its fix."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from qcompile.generation.embedded_models import embedded, embedded_encoder
from qcompile.generation.model_name import ModelNotFound


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="embedded model is not installed. Fix:\n  pip install"):
        embedded()
    with pytest.raises(ModelNotFound, match="embedded encoder is not installed. Fix:\n  pip install"):
        embedded_encoder()


def test_files_are_those_inside_the_packages(monkeypatch, tmp_path):
    (tmp_path / "inside").mkdir()
    file = tmp_path / "inside" / "m.gguf"
    file.touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert embedded() == file and embedded_encoder() == tmp_path / "model"
