"""The `torch.compile` backend; the entry point is `qcompile.backend:qcompile`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.backend.dynamo import qcompile, reports
    from qcompile.backend.options import OPTIONS, Options

__all__ = ["OPTIONS", "Options", "qcompile", "reports"]


def __getattr__(name: str) -> Any:
    """The backend when it is first used: it imports Dynamo, which takes seconds."""
    if name in ("qcompile", "reports"):
        from qcompile.backend import dynamo as module
    elif name in ("OPTIONS", "Options"):
        from qcompile.backend import options as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module 'qcompile.backend' has no attribute {name!r}")
    return getattr(module, name)
