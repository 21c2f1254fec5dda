"""A GGUF file parsed once: transformers asks for its configuration twice, its tensors and its tokenizer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()


@contextmanager
def parsed_once() -> Iterator[Callable[[str], Any]]:
    """While it is open, `gguf` parses each file once, and makes each architecture's table of names once.

    Gives what parses a file, by its path.

    A vocabulary is a hundred thousand small reads in Python, and the table is asked for at every module of the model:
    most of the time that a small file takes to load. One thread at a time.
    """
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # the package has no types
        """Reads through a plain array: a slice of a `numpy.memmap` costs several of that."""

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(mapped.__class__.__base__)

    with _lock:
        before = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader = functools.cache(Reader)
        gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
        try:
            yield gguf.GGUFReader
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = before
