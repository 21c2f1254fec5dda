"""Tell transformers of our quantizer, as soon as it has a table to enter it in.

transformers finds quantizers in a table of `transformers.quantizers.auto` and has no entry points for packages. That
file is imported with the first model class, which takes seconds, so `import qcompile` does not import it: if it is
there already the table gets its entries at once, else right after it was imported, by whomever.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

TABLES = "transformers.quantizers.auto"
_QUANTIZER = "qcompile.transformers_plugin.hf_quantizer"


def register_when_imported() -> None:
    """Enter our classes in the tables of transformers, now or when it is imported."""
    tables = sys.modules.get(TABLES)
    if tables is not None and hasattr(tables, "AUTO_QUANTIZER_MAPPING"):
        register(tables)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(tables: ModuleType) -> None:
    """Enter our classes in the tables.

    Args:
        tables: the module `transformers.quantizers.auto`.

    Warns:
        UserWarning: a transformers whose quantizers are others; `from_pretrained` then refuses our folders.
    """
    try:
        quantizer = importlib.import_module(_QUANTIZER)
        if hasattr(quantizer, "enter"):  # else it is being imported itself, and enters itself at its end
            quantizer.enter(tables)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"this transformers does not take qcompile's quantizer ({error}): from_pretrained refuses its folders. "
            "Fix: pip install -U transformers, or read them with qcompile.load",
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: has the loader of one module call `register` when the module was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with a loader that registers."""
        if fullname != TABLES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(importlib.abc.Loader):
    """A loader that registers after another has executed the module."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other loader does; then our classes are entered, and the module has its own loader again."""
        self.loader.exec_module(module)
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        register(module)
