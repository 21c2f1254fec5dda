"""The version of this package, which everything written to disk carries; and no other package of its name."""

from __future__ import annotations

from importlib import metadata

VERSION = "0.1.0"


def refuse_other_distribution() -> None:
    """Raise ImportError where the distribution `qcompile` is installed, a package for quantum circuits.

    It has the same import name, so that files of both would lie in one folder. Ours is called `torch-qcompile`.
    """
    try:
        other = metadata.distribution("qcompile")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution qcompile {other.version} is installed, another package with the import name of "
        "torch-qcompile. Fix: pip uninstall qcompile torch-qcompile, then pip install torch-qcompile",
        name="qcompile",
    )
