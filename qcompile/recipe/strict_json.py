"""JSON files read strictly: what is damaged, or says one thing twice, ends in one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class DamagedJson(ValueError):
    """A JSON file that cannot be read; the text names the file and what is wrong with it."""


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        DamagedJson: it cannot be read, is no JSON or not UTF-8, nests too deeply, names a key twice, or holds NaN, an
            infinity or a number beyond float64.
    """
    if not Path(path).is_file():  # a pipe would be waited for
        raise DamagedJson(f"{path} is no file")
    try:
        return parse_json(Path(path).read_bytes().decode("utf-8"))
    except RecursionError:
        reason = "it nests too deeply"
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
    raise DamagedJson(f"{path} is damaged ({reason})")


def parse_json(text: str) -> Any:
    """JSON as data.

    Raises:
        ValueError: as `read_json`, without the file; RecursionError where it nests too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in data if keys.count(key) > 1)!r} stands twice")
    return data


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value
