"""The environment of a measurement is complete, and missing packages do not matter."""

from __future__ import annotations

from importlib import metadata

import torch

from qcompile.memory import environment


def test_versions_name_what_speed_depends_on():
    found = environment.versions()
    assert found["torch"] == metadata.version("torch") and found["threads"] == str(torch.get_num_threads())
    assert {"python", "cpu", "isa"} <= set(found) and all(found.values())


def test_packages_that_are_not_installed_are_omitted(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    assert set(environment.versions()) == {"python", "threads", "cpu", "isa"}
