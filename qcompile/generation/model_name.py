"""Whether the name of a model leads anywhere, said before transformers guesses: a path, a hub id, or nothing.

A name that can only be a path must exist. One that may be a hub id, and is no folder here, needs the hub: without it
only what the local cache has is read, at once, in place of half a minute of attempts.
"""

from __future__ import annotations

import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_SECONDS = 3.0  # to reach the hub
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # any of them, as huggingface_hub reads them


class ModelNotFound(ValueError):
    """No such model; the text says where it was looked for and the fix."""


def require_model(name: str) -> None:
    """Check that a name is a path that exists, or a hub id that the hub or its local cache may have.

    Where the hub cannot be reached, libraries of the hub are told to stay offline.

    Raises:
        ModelNotFound: with the fix.
    """
    if not name.strip():
        raise ModelNotFound("the name of the model is empty. Fix: give a folder, a .gguf file, a hub id, or 'embedded'")
    try:
        if Path(name).exists():
            return
    except (OSError, ValueError):  # too long, or with a null byte
        pass
    if _HUB_ID.fullmatch(name) is None or name.endswith(".gguf") or ".." in name:
        raise ModelNotFound(f"the model {name} is not found: there is no such file or folder. Fix: check the path")
    if is_cached(name):
        if not is_reachable():
            _stay_offline()
    elif not is_reachable():
        raise ModelNotFound(
            f"the model {name} is not found: there is no such folder, and the hub is offline. Fix: check the path, or "
            "go online"
        )


def is_cached(name: str) -> bool:
    """Whether the hub's local cache has a model."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ModuleNotFoundError:
        return True  # what loads the model says what is not installed
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def is_reachable() -> bool:
    """Whether the hub answers within seconds; looking up its name may take longer, so that a thread does it."""
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE):
        return False
    answers: list[bool] = []

    def call() -> None:
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError):
            return
        answers.append(True)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return bool(answers)


def _stay_offline() -> None:
    from huggingface_hub import constants

    os.environ[_OFFLINE[0]] = "1"
    constants.HF_HUB_OFFLINE = True
