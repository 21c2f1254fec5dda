"""The `torch.compile` backend; the entry point is `qcompile.backend:qcompile`."""

from qcompile.backend.dynamo import qcompile, reports
from qcompile.backend.options import OPTIONS, Options

__all__ = ["OPTIONS", "Options", "qcompile", "reports"]
