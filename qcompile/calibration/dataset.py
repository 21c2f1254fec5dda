"""Calibration data of a data set: rows with `messages` (a conversation) or `text`, cut into windows of tokens.

    DataRows.open("chats.jsonl")                    JSON lines, one row a line; read without any package
    DataRows.open("org/name:config@split")          anything that the package datasets loads: a hub's name, or a path

A conversation is written by the tokenizer's chat template, a text is taken as it is and ends with the tokenizer's end
token. Rows are one stream of tokens, which is cut into windows, as texts are (text.py). No more rows are read than the
windows need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.calibration.context_length import within_context
from qcompile.calibration.text import CALIBRATION_LENGTH

COLUMNS = ("messages", "text")
"""What is read of a row: the first of these that it has."""

LINES = (".jsonl", ".ndjson")
"""How names of files of JSON lines end."""


class DataError(ValueError):
    """A data set that cannot be read, or rows without text; the text names the row and the fix."""


@dataclass(frozen=True)
class DataRows:
    """Rows of a data set.

    Attributes:
        name: what was opened.
        column: what is read of each row.
        rows: begins to read the rows, each a mapping by column, from the first.
    """

    name: str
    column: str
    rows: Callable[[], Iterable[dict[str, Any]]]

    @staticmethod
    def open(source: str | Path, column: str | None = None) -> DataRows:
        """Open a data set and look at its first row.

        Args:
            source: a file of JSON lines; or a name of the package datasets, with ":CONFIG" and "@SPLIT" (default:
                "train") behind it, or a path that it loads.
            column: what to read; None: `messages`, or else `text`.

        Raises:
            DataError: it cannot be read, is empty, or has no such column.
        """
        name = str(source)
        rows = _lines_of(Path(name)) if Path(name).suffix in LINES else _library_rows(name)
        first = next(iter(rows()), None)
        if first is None:
            raise DataError(f"the data set {name} is empty. Fix: give rows")
        choices = COLUMNS if column is None else (column,)
        found = next((choice for choice in choices if choice in first), None)
        if found is None:
            raise DataError(
                f"the data set {name} has the columns {', '.join(map(repr, first))}, and none is "
                f"{' or '.join(map(repr, choices))}. Fix: rename the one that has the text"
            )
        return DataRows(name, found, rows)

    def tokens(self, tokenizer: Any) -> Iterator[list[int]]:
        """The token ids of each row that has a text.

        Args:
            tokenizer: of transformers; writes conversations by its chat template.

        Raises:
            DataError: a row without text, messages that are no conversation, or a tokenizer without a template.
        """
        end = getattr(tokenizer, "eos_token_id", None)
        for number, row in enumerate(self.rows(), 1):
            value = row.get(self.column)
            if isinstance(value, str):
                if value.strip():
                    yield _ids(tokenizer, value) + ([] if end is None else [end])
            elif isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
                yield _ids(tokenizer, self._conversation(tokenizer, value, number))
            elif value is not None:
                raise DataError(
                    f"row {number} of {self.name}: {self.column!r} is {str(value)[:40]!r}, no text and no list of "
                    'messages. Fix: write a text, or [{"role": "user", "content": ".."}, ..]'
                )

    def _conversation(self, tokenizer: Any, messages: list[dict[str, Any]], number: int) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{self.name} has conversations, and this tokenizer no chat template. Fix: give rows with 'text', or a "
                "model that was trained for conversations"
            )
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())
            raise DataError(
                f"row {number} of {self.name}: the chat template refuses it ({type(error).__name__}: {reason:.200}). "
                'Fix: write [{"role": "user", "content": ".."}, ..]'
            ) from error


def dataset_batches(
    tokenizer: Any,
    source: str | Path | DataRows,
    *,
    length: int | None = None,
    count: int = 16,
    model: nn.Module | None = None,
) -> list[dict[str, Tensor]]:
    """Calibration batches of a data set: windows of the stream of tokens of its rows. Deterministic.

    Args:
        tokenizer: of transformers.
        source: as of `DataRows.open`, or what it gave.
        length: tokens of a window; None for 512, or the model's context where that is less.
        count: windows at most.
        model: whose context limits the default length; None: the tokenizer's limit is taken.

    Returns:
        {"input_ids": [1, length]} each.

    Raises:
        DataError: as of `DataRows`, or the rows are shorter than one window.
        ValueError: no window of this length can be cut.
    """
    if length is None:
        length = within_context(CALIBRATION_LENGTH, model, tokenizer)
    if length < 1 or count < 1:
        raise ValueError(f"length={length}, count={count}: rows are cut into 1 window or more, of 1 token or more")
    data = source if isinstance(source, DataRows) else DataRows.open(source)
    ids: list[int] = []
    for row in data.tokens(tokenizer):
        ids += row
        if len(ids) >= length * count:
            break
    if len(ids) < length:
        raise DataError(
            f"the data set {data.name} has {len(ids)} tokens, one window needs {length}. Fix: give more rows"
        )
    stream = torch.tensor(ids[: min(count, len(ids) // length) * length])
    return [{"input_ids": window[None]} for window in torch.split(stream, length)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _lines_of(path: Path) -> Callable[[], Iterator[dict[str, Any]]]:
    """The rows of a file of JSON lines."""

    def rows() -> Iterator[dict[str, Any]]:
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _row(path, number, line)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no UTF-8 text (at byte {error.start}). Fix: convert it") from None
        except OSError as error:
            raise DataError(f"the data set {path} cannot be read: {error.strerror}. Fix: check the path") from None

    return rows


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"line {number} of {path} is no JSON ({error}). Fix: write one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"line {number} of {path} is {type(row).__name__}, no object. Fix: write one object a line")
    return row


def _library_rows(name: str) -> Callable[[], Iterable[dict[str, Any]]]:
    """The rows of what the package datasets loads, read as they are needed."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"{error}: {name} needs it. Fix: pip install 'torch-qcompile[data]', or give a file of JSON lines (.jsonl)"
        ) from error
    place = Path(name)
    try:
        if (place / "state.json").is_file():  # of Dataset.save_to_disk
            loaded = datasets.load_from_disk(name)
        elif place.is_file():
            loaded = datasets.load_dataset(_builder(place), data_files=name, split="train", streaming=True)
        else:
            path, config, split = _parts(name)
            loaded = datasets.load_dataset(path, config, split=split, streaming=True)
    except DataError:
        raise
    except Exception as error:  # of the package, of hubs and of files, of whatever kind
        reason = " ".join(str(error).split())
        raise DataError(
            f"the data set {name} cannot be read ({type(error).__name__}: {reason:.300}). Fix: NAME, NAME:CONFIG or "
            "NAME@SPLIT of a hub that can be reached, or a path; or a file of JSON lines (.jsonl)"
        ) from error
    rows: Iterable[dict[str, Any]] = loaded
    return lambda: rows


def _builder(path: Path) -> str:
    """The part of the package that reads a file."""
    found = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}.get(path.suffix)
    if found is None:
        raise DataError(f"{path} has no known kind. Fix: name a .jsonl, .json, .csv, .parquet, .arrow or .txt file")
    return found


def _parts(name: str) -> tuple[str, str | None, str]:
    """ "org/name:config@split" -> its parts; a path that exists is whole."""
    if Path(name).exists():
        return name, None, "train"
    found = re.fullmatch(r"(?P<path>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?", name)
    if found is None:
        raise DataError(f"{name} is no name of a data set. Fix: write NAME, NAME:CONFIG or NAME:CONFIG@SPLIT")
    return found["path"], found["config"], found["split"] or "train"
